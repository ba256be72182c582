"""Tenants of a run: those that its texts name, their adapters' memory and buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from cosched.build.embedded import build_world
from cosched.errors import ConfigError, WorkloadError
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.runs.experiment import Experiment
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import RunFolder
from cosched.workload.requests import check_texts
from tests.helpers.adapters import FAMILIES, Configure, same


@pytest.fixture
def per_tenant(configure: Configure) -> Config:
    return configure("adapt.scope={state: per_tenant, tenants: [a, b, c]}", "engine.max_batch=3")


def write_prompts(path: Path, *tenants: Any) -> Path:
    """A file of short prompts, each of a tenant; None names none."""
    lines = [
        {"id": f"p{i}", "text": f"NAME\nprogram{i} - does this and that"}
        | ({} if tenant is None else {"tenant": tenant})
        for i, tenant in enumerate(tenants)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("tenant", "message"),
    [
        (
            "d",
            r"tenant without an adapter: request p1 is of 'd'; adapt\.scope\.tenants has a, b, c",
        ),
        (None, "request p1 names no tenant"),
        (7, "line 2 of .* has the tenant 7; expected a name"),
    ],
)
def test_a_tenant_without_an_adapter_is_found_before_the_run(
    per_tenant: Config, tmp_path: Path, tenant: Any, message: str
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a", tenant)
    workload = msgspec.structs.replace(per_tenant.workload, prompts=str(prompts))
    with pytest.raises(WorkloadError, match=message):
        build_world(msgspec.structs.replace(per_tenant, workload=workload))


def test_tenants_of_a_variant_are_looked_for_too(configure: Configure, tmp_path: Path) -> None:
    """By a run before it begins, and by ``cosched check``."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a", "d")
    scope = "{kind: lora, rank: 4, state: per_tenant, tenants: [a]}"
    words = (f"workload.prompts={prompts}", f"variants.mine.scope={scope}")
    for check in (build_world, check_texts):
        check(configure(*words))  # no arm learns that way
        with pytest.raises(
            WorkloadError, match=r"p1 is of 'd'; variants\.mine\.scope\.tenants has a"
        ):
            check(configure(*words, "arms=[plain, mine]"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, marks=pytest.mark.long if number else ())
        for number, one in enumerate(FAMILIES)
    ],
)
def test_a_run_with_tenants(configure: Configure, tmp_path: Path, family: str) -> None:
    """From files to files: the plain text, events that say whose they are, a draft for each tenant;
    and the same from a recording, which knows the tenants."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", "a", "b", "a", "b")
    config = configure(
        f"workload.prompts={prompts}",
        "adapt.scope={state: per_tenant, tenants: [a, b, c]}",
        "engine.max_batch=2",
        "engine.num_threads=1",
        "arms=[plain, adapted]",
        family=family,
    )
    folder = RunFolder(config.run_folder)
    folder.create()
    summary = Experiment(config, record=True).run(folder)
    adapted = summary.arms["adapted"]
    assert adapted.lossless_mismatches == 0
    assert adapted.versions == adapted.updates > 4
    lines = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    published = [line for line in lines if line["kind"] == "publication"]
    assert {line["adapter"] for line in published} == {"a", "b"}
    assert [line["version"]["version"] for line in published] == [*range(1, adapted.versions + 1)]
    checkpoints = folder.path / "checkpoints/adapted"
    drafts = {p.name: load_file(p / "model.safetensors") for p in checkpoints.iterdir()}
    loaded = load_file(Path(config.drafter_settings.path) / "model.safetensors")
    assert drafts["a"].keys() == drafts["b"].keys() == loaded.keys()
    assert not same(drafts["a"], drafts["b"])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in drafts["c"].items())

    engine = msgspec.structs.replace(config.engine, kind="trace", trace=str(folder.path / "trace"))
    again = msgspec.structs.replace(config, engine=engine, arms=("adapted",))
    replayed = RunFolder(tmp_path / "replayed")
    replayed.create()
    assert Experiment(again).run(replayed).arms["adapted"].versions > 4


def test_memory_of_several_adapters(configure: Configure) -> None:
    """One copy of the draft for all of them; everything that is an adapter's as often as there are."""
    one, three = (
        footprint(config, *sketch(config))
        for config in (
            configure("engine.max_batch=3", "adapt.trainer.zero_stage=1"),
            configure(
                "adapt.scope.state=per_request", "engine.max_batch=3", "adapt.trainer.zero_stage=1"
            ),
        )
    )
    adapters = 3 * one.num_trained
    assert three.num_trained == adapters
    assert (three.masters, three.moments) == (8 * adapters, 8 * adapters)
    assert three.first_weights == 4 * adapters
    assert three.trainer_copy == 4 * (three.num_draft_parameters + adapters)
    assert three.serving_adapters == 4 * adapters
    assert three.last_good == 2 * 4 * adapters
    assert (three.merged, one.serving_adapters) == (0, 0)
    assert three.replay == one.replay


def test_a_buffer_too_small_for_all_adapters(configure: Configure) -> None:
    """What the buffer may hold is shared out, and too little of it is no request for anybody."""
    scope = "adapt.scope={state: per_tenant, tenants: [a, b, c]}"
    for key, value in (("max_tokens", 160), ("max_bytes", 1 << 20)):
        fits = configure(f"adapt.memory.{key}={value}")
        footprint(fits, *sketch(fits))
        config = configure(scope, f"adapt.memory.{key}={value}")
        with pytest.raises(ConfigError, match=rf"{key}: {value} holds no .* each of 3 adapters"):
            footprint(config, *sketch(config))
