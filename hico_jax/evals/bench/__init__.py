"""The paper's benchmarks: official annotation files in, two scores side by side out.

`annotations.py` reads, `prompts.py` asks, `matchers.py` and `grounding.py` judge, `tasks.py` joins them into one table,
`scores.py` sums up, `runner.py` asks a model and remembers, `command.py` is `hico eval`.
"""
