"""Every recorded prompt of the reference's harness, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from hico_jax.evals.bench import prompts

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", ["mvbench", "mlvu", "lvbench", "perceptiontest"])
def test_prompts_as_recorded(golden: Any, name: str) -> None:
    docs = golden.json(f"H_eval_{name}.json")["docs"]
    assert len(docs) >= 6
    for case in docs:
        assert getattr(prompts, name)(case["doc"]) == case["doc_to_text"]


def test_videomme_as_recorded(golden: Any) -> None:
    for case in golden.json("H_eval_videomme.json")["docs"]:
        assert prompts.videomme(case["doc"]) == case["doc_to_text"]
        assert prompts.videomme_subtitles(case["doc"], case["srt"]) == case["doc_to_text_subtitle"]["out"]
    for case in golden.json("H_eval_videomme.json")["srt_time"]:
        assert prompts.clock_seconds(case["in"]) == case["out"]


def test_longvideobench_as_recorded(golden: Any) -> None:
    recorded = golden.json("H_eval_longvideobench.json")
    for case in recorded["docs"]:
        assert prompts.longvideobench(case["doc"], case["subtitles"]) == case["doc_to_text"]["out"]
    for case in recorded["compute_frame_timestamps"]:
        assert prompts.virtual_times(case["duration"], case["max_num_frames"]) == case["out"]
    for case in recorded["insert_subtitles_into_frames"]:
        image = "<image>" if case["add_image"] else None
        found = prompts.insert_subtitles(
            case["frame_timestamps"], case["subtitles"], case["start"], case["duration"], image
        )
        assert found == case["out"]
    for case in recorded["timestamp_to_seconds"]:
        assert prompts.clock_seconds(case["in"]) == case["out"]


def test_charades_as_recorded(golden: Any) -> None:
    for case in golden.json("H_eval_temporal_grounding.json")["docs"]:
        assert prompts.charades(case["doc"]) == case["doc_to_text"]


def test_a_subtitle_file_without_a_line_leaves_its_heading() -> None:
    record = {"question": "Who?", "options": ["A. x", "B. y"]}
    text = prompts.videomme_subtitles(record, "1\n00:00:00,100 --> 00:00:01,000\nplain\n")
    assert text.startswith("This video's subtitles are listed below: \n\nThese are the frames of a video. Select")
