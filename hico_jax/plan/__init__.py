"""What a run asks of a slice: chips, formulas, the compiler, and `hico plan` (run.py) over them."""
