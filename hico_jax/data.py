"""`hico data`: look at a data set before a run, or make it ready for a pod.

In: the command line. Out: a report, or a prepared folder.
"""

from __future__ import annotations

import argparse
import json
import warnings

from hico_jax import registry


def main(args: argparse.Namespace) -> int:
    """`hico data check FILE` and `hico data prepare FILE --out DIR`: 0 sound, 1 with defects."""
    from data_pipeline.options import DataConfig

    config = DataConfig(
        data_root=args.data_root, sample=args.sample, min_frames=args.min_frames, max_frames=args.max_frames
    )
    if args.action == "prepare":
        return _prepare(args)
    from data_pipeline.check import check
    from data_pipeline.tokenizer import load_tokenizer

    geometry = registry.model_config(args.model).geometry()
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    say = (lambda _: None) if args.json else print
    report = check(args.file, config, geometry, tokenizer, decode=not args.headers, say=say)
    if args.json:
        told = {"samples": report.samples, "defects": [d._asdict() for d in report.defects], "lengths": report.lengths}
        print(json.dumps(told))
    else:
        print(report.text())
    return 1 if report.bad else 0


def _prepare(args: argparse.Namespace) -> int:
    from data_pipeline.annotations import read_annotations

    if not args.out:
        raise ValueError("say where to write: hico data prepare FILE --out DIR")
    samples = read_annotations(args.file, args.data_root, strict=False)  # a bad one stays a counted hole
    beam = None
    if args.beam:
        try:
            from apache_beam.options.pipeline_options import PipelineOptions  # type: ignore[import-not-found]
        except ImportError:
            raise ValueError("--beam needs Apache Beam: pip install apache-beam") from None
        import tensorflow_datasets as tfds

        beam = tfds.download.DownloadConfig(beam_options=PipelineOptions(args.beam.split()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the builder, about what it was not asked
        from data_pipeline.prepare import prepare

        folder = prepare(samples, args.out, beam=beam)
    print(f"{len(samples)} samples in {folder}; train with --config.data.annotations={args.out}")
    return 0
