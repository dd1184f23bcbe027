from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.options import DataConfig
from hico_jax import checkpoint, cli, lora, optim, registry, start, step
from hico_jax import config as configs
from hico_jax.batch import Batch
from hico_jax.config import CheckpointConfig, Experiment, TrainConfig
from hico_jax.convert import load, safetensors_io
from hico_jax.parallel.mesh import MeshConfig, make_mesh

MODEL = registry.model_config("tiny")
ALL = (optim.LLM, r"projector/.*w", r"vision/blocks/(attn/(wqkv|wo)|(up|down)/w)")


def experiment(base: str, workdir: str = "", **changed: Any) -> Experiment:
    return Experiment(
        "lora", "tiny", MODEL, DataConfig(batch_size=4),
        optim.OptimConfig(lr=1e-2, rates=((r"lora/.*", "lr"),), warmup_steps=0, schedule="constant"),
        lora=optim.LoraConfig(rank=2, alpha=4.0, targets=ALL, base=base), train=TrainConfig(steps=4), workdir=workdir,
        **changed,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        pytest.param("int8", (optim.LLM,), id="int8"),
        pytest.param("int8", ALL, marks=pytest.mark.slow, id="int8-all"),
        pytest.param("full", ALL, marks=pytest.mark.slow, id="full-all"),
    ],
)
def test_adapters_train_merge_and_leave_the_base_alone(
    base: str, targets: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    settings = experiment(base, str(tmp_path))
    settings = dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, targets=targets))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = jax.tree.map(jnp.asarray, Batch.fake(MODEL.geometry(), rows=4, vocab=MODEL.llm.vocab_size))
    with jax.set_mesh(mesh):
        begun = start.init_state(settings, mesh)
        names = optim.parameter_names(begun.state.trainable)
        assert all(n.startswith("lora/") for n in names)
        assert {n.split("/")[1] for n in names} == ({"llm", "projector", "vision"} if targets == ALL else {"llm"})
        held = sum(a.nbytes for a in jax.tree.leaves(begun.state.optimizer))
        assert held < 3 * sum(a.nbytes for a in jax.tree.leaves(begun.state.trainable))
        run = jax.jit(
            lambda s, b: step.train_step(s, b, graphdef=begun.graphdef, tx=begun.optimizer, settings=settings)
        )
        state, losses = begun.state, []
        for _ in range(3):
            state, numbers = run(state, batch)
            losses.append(float(numbers["loss"]))
        assert losses[2] < losses[0]
        for a, b in zip(jax.tree.leaves(begun.state.frozen), jax.tree.leaves(state.frozen), strict=True):
            assert (a == b).all()
        # Saved, read back as a plain model, and equal to the adapted one.
        saved = checkpoint.Checkpointer(str(tmp_path), CheckpointConfig())
        config = {"lora": dataclasses.asdict(settings.lora)}
        params = start.params_dict(state.trainable, state.frozen)
        saved.save(3, params, checkpoint.to_dict(state.optimizer), {"config": config})
        saved.close()
        saved = checkpoint.Checkpointer(str(tmp_path), CheckpointConfig())
        again = start.init_state(settings, mesh, saved)
        saved.close()
        (tmp_path / "config.json").write_text(configs.to_json(settings))
        assert cli.main(["export", str(tmp_path), str(tmp_path / "peft"), "--part", "adapter"]) == cli.OK
        assert cli.main(["export", str(tmp_path / "peft"), str(tmp_path / "no"), "--part", "adapter"]) == cli.MISUSED
        _same_as_peft(tmp_path / "peft", lora.adapted(checkpoint.flatten(state.trainable)))
        for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(state), strict=True):
            assert (a == b).all()
    plain = nnx.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(plain)
    merged = lora.load_merged(str(tmp_path), checkpoint.to_dict(abstract))
    model = nnx.merge(graph, checkpoint.from_dict(merged.params, abstract))
    adapted = nnx.merge(begun.graphdef, *lora.join(state.trainable, state.frozen, settings.lora))
    rows = jax.tree.map(lambda a: a[:1], batch)  # fewer to compile for
    hidden = jax.jit(lambda m, b: m(b).x)
    np.testing.assert_allclose(hidden(model, rows), hidden(adapted, rows), atol=2e-5)


def _same_as_peft(folder: pathlib.Path, paths: list[str]) -> None:
    """The names and shapes that PEFT looks for: A is rank x inputs, B is outputs x rank."""
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["peft_type"], told["r"], told["lora_alpha"], told["bias"]) == ("LORA", 2, 4.0, "none")
    tensors = safetensors_io.open_tensors(folder / "adapter_model.safetensors")
    abstract = checkpoint.flatten(nnx.split(nnx.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0))))[1])
    names = set()
    for rule in load.rules(MODEL):
        if rule.path not in paths:
            continue
        shape = abstract[rule.path].shape
        count, shape = (shape[0], shape[1:]) if rule.stacked else (1, shape)
        outputs, inputs = rule.torch_shape(shape)[0], int(np.prod(rule.torch_shape(shape)[1:]))
        for module in rule.names(count):
            name = f"base_model.model.{module.removesuffix('.weight')}"
            names |= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
            assert np.asarray(tensors[f"{name}.lora_A.weight"]).shape == (2, inputs)
            assert np.asarray(tensors[f"{name}.lora_B.weight"]).shape == (outputs, 2)
    assert names == set(tensors)
    assert {f"base_model.model.{m}" for m in told["target_modules"]} == {n.rsplit(".", 2)[0] for n in names}


def test_a_peft_folder_holds_the_same_sum(tmp_path: pathlib.Path) -> None:
    settings = experiment("full")
    _, _, frozen = optim.split(nnx.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0))), ((r".*", None),))
    rng = np.random.default_rng(0)
    frozen = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), a.dtype), frozen)
    adapters = jax.tree.map(lambda a: a + 0.01, lora.begin(frozen, settings.lora, 0))
    base = checkpoint.flatten(frozen)
    arrays = base | checkpoint.flatten(adapters)
    rules = {r.path: r for r in load.rules(MODEL)}
    modules = lora.save_peft(arrays, settings.lora, rules, tmp_path)
    merged = lora.merge(arrays, settings.lora)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["r"] == 2
    assert set(told["target_modules"]) == set(modules)
    tensors = safetensors_io.open_tensors(tmp_path / "adapter_model.safetensors")
    for path in lora.adapted(arrays):
        rule = rules[path]
        for i, name in enumerate(rule.names(MODEL.llm.num_layers)):
            if rule.stacked and i >= base[path].shape[0]:
                break
            module = name.removesuffix(".weight")
            left, right = (np.asarray(tensors[f"base_model.model.{module}.lora_{s}.weight"]) for s in "AB")
            layer = (lambda a, i=i: np.asarray(a)[i]) if rule.stacked else np.asarray
            change = rule.to_torch(layer(merged[path])) - rule.to_torch(layer(base[path]))
            np.testing.assert_allclose(change, 2.0 * right @ left, atol=1e-5, err_msg=path)


def test_a_pattern_must_match_matrices() -> None:
    frozen = optim.split(nnx.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0))), ((r".*", None),))[2]
    for pattern, said in ((r"llm/none", "matches no parameter"), (r"llm/norm/scale", "no matrix")):
        with pytest.raises(ValueError, match=said):
            lora.begin(frozen, optim.LoraConfig(rank=2, targets=(pattern,)), 0)
    for changed in ({"rank": -1}, {"alpha": 0.0}, {"base": "nf9"}):
        with pytest.raises(ValueError, match="lora"):
            optim.LoraConfig(**changed)
