"""`python -m efficientai_toolkit`."""

from .cli import main

main()
