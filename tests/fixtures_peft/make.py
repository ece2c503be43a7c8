"""Makes this folder's fixtures with PyTorch, Transformers and Hugging Face PEFT; run it where those are installed.

    python tests/fixtures_peft/make.py [FOLDER_OF_ALL_MINILM_L6_V2]

`encoders.safetensors`: tiny random encoders and their hidden states. `bert.safetensors`, `llama.safetensors`: a tiny
base, and for each method PEFT's arrays (moved off their start), its output, its count of trainable parameters, and for
LoRA and DoRA its gradients. `minilm.safetensors`: mean-pooled embeddings of the real model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def ids_and_mask(pad: int, lengths=(9, 6, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 40, (len(lengths), 9), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        ids[row, length:] = pad
    return ids, (ids != pad).long()


def randomised(model: torch.nn.Module, scale: float, only_trained: bool = False) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad or not only_trained:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def packed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def save(name: str, tensors: dict[str, torch.Tensor], about: dict) -> None:
    save_file(tensors, HERE / name, metadata={"about": json.dumps({"versions": VERSIONS, **about})})


def bert_config() -> transformers.BertConfig:
    return transformers.BertConfig(**SIZES, max_position_embeddings=24)


def encoders() -> None:
    configs = {
        "bert": bert_config(),
        "roberta": transformers.RobertaConfig(**SIZES, max_position_embeddings=24, type_vocab_size=1, pad_token_id=1),
        "distilbert": transformers.DistilBertConfig(
            vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=32, max_position_embeddings=24
        ),
    }
    tensors, about = {}, {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = randomised(transformers.AutoModel.from_config(config), 0.2)
        ids, mask = ids_and_mask(config.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if name == "bert":  # two segments, parted by the separator 3
            ids[0, 4] = ids[0, 8] = ids[1, 2] = ids[1, 5] = ids[2, 3] = 3
            inputs["token_type_ids"] = torch.tensor([[0] * 5 + [1] * 4, [0] * 3 + [1] * 3 + [0] * 3, [0] * 9])
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        tensors |= packed(f"{name}/weights", model.state_dict()) | packed(name, {"ids": ids.int(), "hidden": hidden})
        about[name] = config.to_dict()
    save("encoders.safetensors", tensors, {"configs": about})


def methods(kind: str) -> dict[str, peft.PeftConfig]:
    bert = kind == "bert"
    task = {"task_type": "FEATURE_EXTRACTION" if bert else "CAUSAL_LM"}
    pair = ["query", "value"] if bert else ["q_proj", "v_proj"]
    down = r".*layer\.\d+\.output\.dense" if bert else r".*mlp\.down_proj"
    key_value = r".*\.(key|value)" if bert else r".*\.(k_proj|v_proj)"
    low_rank = {"r": 4, "lora_alpha": 8, "target_modules": pair, **task}
    return {
        "lora": peft.LoraConfig(**low_rank),
        "rslora": peft.LoraConfig(**low_rank, use_rslora=True),
        "dora": peft.LoraConfig(**low_rank, use_dora=True),
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=10, target_modules=pair, **task),
        "ia3": peft.IA3Config(target_modules=f"({key_value})|({down})", feedforward_modules=down, **task),
        "vera": peft.VeraConfig(r=8, target_modules=pair, **task),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, **task),
        "prefix_mlp": peft.PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12, **task
        ),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **task),
        "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=12, **task),
    }


def base_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertModel(bert_config(), add_pooling_layer=False)
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
        )
    return randomised(model, 0.2)


def adapters(kind: str) -> None:
    base = base_model(kind)
    ids, mask = ids_and_mask(0, lengths=(9, 6, 4) if kind == "bert" else (9, 9, 9))
    tensors = packed("base", base.state_dict()) | {"ids": ids.int()}
    about = {"config": base.config.to_dict(), "trainable": {}}
    for name, config in methods(kind).items():
        torch.manual_seed(3)
        model = randomised(peft.get_peft_model(base_model(kind), config), 0.1, only_trained=True)
        out = model(input_ids=ids, attention_mask=mask)[0]
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        about["trainable"][name] = sum(p.numel() for p in trained.values())
        fixed = {n: b for n, b in model.named_buffers() if "vera_" in n}
        tensors |= packed(f"{name}/arrays", {**trained, **fixed}) | packed(name, {"out": out})
        if name in ("lora", "dora"):
            grads = torch.autograd.grad((out**2).mean(), list(trained.values()))
            tensors |= packed(f"{name}/grads", dict(zip(trained, grads, strict=True)))
    save(f"{kind}.safetensors", tensors, about)


def minilm(folder: str) -> None:
    texts = [
        "how do I change my PIN",
        "what is the exchange rate today?",
        "book a table for four at the Italian place on Friday night, please",
        "Ünïcödé, naïve café & 東京",
        "ok",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].float()
    save("minilm.safetensors", {"embeddings": (hidden * weight).sum(1) / weight.sum(1)}, {"texts": texts})


if __name__ == "__main__":
    encoders()
    adapters("bert")
    adapters("llama")
    if len(sys.argv) > 1:
        minilm(sys.argv[1])
