"""What compression buys and costs: other compressors in place of the model's own, and whole inference by length.

`methods.py` the compressors compared, `world.py` questions by kind of task, `command.py` is `hico compress`;
`latency.py` times one film from file to answer, `bench.py` is `hico bench`.
"""
