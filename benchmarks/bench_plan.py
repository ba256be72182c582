"""What ``cosched plan`` predicts of 1, 2 and 4 servers, and what they then do; and tables of many servers.

    python benchmarks/bench_plan.py measure FOLDER [--seconds 40] [--json FILE]
    python benchmarks/bench_plan.py intake
    python benchmarks/bench_plan.py tables

``measure`` runs the tiny world once, frozen and learning in one process, and plans from that run alone for servers
with a trainer of its own. Then it starts that trainer and 1, 2 and 4 servers, each a process of its own, and
holds what they do against the plan. A round of theirs lasts ROUND_S, as a GPU's would: what it takes less on
this CPU is slept, so that several of them find a core. They say forced text, each from another document on.

``intake`` is what a round of one request costs in Python, at both ends, whatever its bytes.

``tables`` writes the ``config.json`` of Qwen3-8B and of its EAGLE-3 draft, whose sizes are public, and plans
for 8, 64 and 1,024 servers on an H200. What learning brings there is assumed, and shown so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TINYWORLD = ROOT / "tinyworld"
ROUND_S = 0.03
NUMBERS = (1, 2, 4)
TOKENS = 1500  # of an answer
SETTLING_S = 2.0


def write_config(folder: Path) -> Path:
    """The same file for the run, the trainer and the servers."""
    path = folder / "plan.yaml"
    settings = {
        "run": {"name": "run", "dir": str(folder / "runs")},
        "engine": {"num_threads": 1, "device": "cpu"},
        "target": {"path": f"{TINYWORLD}/target"},
        "drafter": {"kind": "eagle3", "path": f"{TINYWORLD}/eagle3", "num_draft_tokens": 3},
        "workload": {
            "documents": f"{TINYWORLD}/documents/translated.jsonl",
            "max_new_tokens": TOKENS,
        },
        "arms": ["frozen", "adapted"],
        "adapt": {
            "policy": {"kind": "every_n_rounds", "rounds": 16},
            "loss": {"kind": "forward_kl", "position_decay": 0.85, "rows": "delayed"},
            "replay": {"window": 128, "anchors": 32},
            "trainer": {"lr": 6e-4},
            "guard": {"kind": "finite"},
            "sidecar": {"address": f"ipc://{folder}/s"},
        },
    }
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "cosched.cli", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# --- a server -----------------------------------------------------------------------------------


def serve(path: Path, words: list[str], number: int, of: int, seconds: float) -> None:
    """Say ``ready``, wait for a line, decode for so long at that pace, and say what came of it."""
    import torch

    from cosched.build.embedded import build_arm, build_world
    from cosched.settings.load import load_config
    from cosched.sidecar.link import Link
    from cosched.telemetry.run_folder import NoEvents

    sent = {"bytes": 0}
    really_send = Link._send

    def counted(link: Link, message: Any, payload: Any = b"") -> None:
        """What goes to the trainer, in shared memory too."""
        sent["bytes"] += len(link._codec.encode(message)[0]) + getattr(message, "size", 0)
        really_send(link, message, payload)

    Link._send = counted
    torch.set_num_threads(1)
    config = load_config(path, words)
    world = build_world(config)
    arm = build_arm(world, "adapted", NoEvents())
    follower: Any = arm.coscheduler
    while not follower.link.there:
        time.sleep(0.05)
    first = number * len(world.requests) // of
    requests = [*world.requests[first:], *world.requests[:first]]
    print("ready", flush=True)
    sys.stdin.readline()
    sent["bytes"] = 0
    begun = time.perf_counter()
    due, rounds, work = begun, 0, []
    for _ in arm.engine.rounds(requests):
        if time.perf_counter() - begun > seconds:
            break
        if follower.counters.rounds == rounds:
            due = time.perf_counter()  # a prefill takes what it takes
            continue
        rounds = follower.counters.rounds
        work.append(time.perf_counter() - due)
        due = max(due + ROUND_S, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))
    taken, counters = time.perf_counter() - begun, follower.counters
    print(
        json.dumps(
            {
                "seconds": taken, "rounds": rounds, "tokens": counters.committed + len(arm.engine._slots),
                "tau": counters.committed / rounds, "bytes": sent["bytes"], "dropped": counters.dropped,
                "exposed": (counters.update_seconds_total + counters.publish_seconds) / taken,
                "version": follower.version, "work": statistics.median(work),
            }
        ),
        flush=True,
    )  # fmt: skip
    follower.link.close()


# --- all of them ------------------------------------------------------------------------------------


def measured(path: Path, number: int, seconds: float) -> dict[str, float]:
    """One trainer and so many servers."""
    words = ["adapt.placement=sidecar", f"run.name=many{number}"]
    log = (path.parent / f"trainer{number}.log").open("w")
    trainer = subprocess.Popen(
        command("train", "-c", path, *words), env=environment(), stdout=log, stderr=log
    )
    servers = [
        subprocess.Popen(
            [sys.executable, __file__, "serve", path, str(seconds), str(one), str(number), *words],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for one in range(number)
    ]
    try:
        for server in servers:
            assert server.stdout is not None
            if server.stdout.readline().strip() != "ready":
                raise SystemExit(f"a server did not start: {log.name}")
        time.sleep(SETTLING_S)
        began = time.time()
        for server in servers:
            assert server.stdin is not None
            server.stdin.write("go\n")
            server.stdin.flush()
        found = [json.loads(server.stdout.readline()) for server in servers if server.stdout]
        ended = time.time()
    finally:
        for process in (*servers, trainer):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (*servers, trainer):
            process.wait(30)
    events = path.parent / "runs" / f"many{number}-trainer" / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    updates = [one for one in lines if one["kind"] == "update" and began <= one["time"] <= ended]
    return {
        "tau": sum(one["tau"] * one["rounds"] for one in found) / sum(one["rounds"] for one in found),
        "tokens": sum(one["tokens"] / one["seconds"] for one in found),
        "updates": len(updates) / seconds,
        "update_ms": 1e3 * statistics.fmean(one["result"]["seconds"] for one in updates),
        "bytes_to_trainer": sum(one["bytes"] / one["seconds"] for one in found),
        "exposed": statistics.fmean(one["exposed"] for one in found),
        "dropped": float(sum(one["dropped"] for one in found)),
        "work_ms": 1e3 * max(one["work"] for one in found),
    }  # fmt: skip


def predicted(path: Path, seconds: float) -> dict[str, Any]:
    servers = ",".join(map(str, NUMBERS))
    words = ["adapt.placement=sidecar", f"plan.servers=[{servers}]", f"plan.seconds={seconds}",
             f"plan.round_seconds={ROUND_S}"]  # fmt: skip
    done = subprocess.run(
        command("plan", "-c", path, "--from", path.parent / "runs" / "run", "--json", *words),
        env=environment(), check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


SHOWN = ("tau", "tokens", "updates", "bytes_to_trainer", "exposed")


def measure(folder: Path, seconds: float, to: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(folder)
    if not (folder / "runs" / "run" / "summary.json").exists():
        subprocess.run(command("run", "-c", path), env=environment(), check=True)
    plan = predicted(path, seconds)
    print("| servers | | planned | measured | error |\n| --- | --- | --- | --- | --- |")
    kept = []
    for line in plan["lines"]:
        number = line["servers"]
        found = measured(path, number, seconds)
        for name in SHOWN:
            band, own = line[name], found[name]
            error = "" if name == "exposed" else f"{band['value'] / own - 1:+.1%}"
            print(
                f"| {number} | {name} | {band['value']:.4g} ({band['low']:.4g} to {band['high']:.4g}) | "
                f"{own:.4g} | {error} |"
            )
        print(f"| {number} | update_ms, work_ms, dropped | | {found['update_ms']:.0f}, "
              f"{found['work_ms']:.0f}, {found['dropped']:.0f} | |", flush=True)  # fmt: skip
        kept.append({"planned": line, "measured": found})
    if to is not None:
        to.write_text(json.dumps(kept, indent=1))


def intake() -> None:
    """What a round costs besides its bytes: who hands it over, and who takes it in, without ZeroMQ."""
    import torch

    from cosched.build.embedded import build_arm, build_world
    from cosched.build.follower import row_form, slot_bytes_of
    from cosched.settings.load import load_config
    from cosched.sidecar.messages import FromServer, Rounds
    from cosched.sidecar.queue import RoundQueue
    from cosched.sidecar.rows import Packer, unpack
    from cosched.sidecar.wire import Codec
    from cosched.telemetry.run_folder import NoEvents

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        config = load_config(
            write_config(Path(name)), ["adapt.policy.kind=never", "workload.max_new_tokens=400"]
        )
    world = build_world(config)
    arm = build_arm(world, "adapted", NoEvents())
    learner, drafter = arm.coscheduler, arm.drafter
    assert learner is not None
    assert drafter is not None
    rounds: list[Any] = []
    really = learner.on_round
    learner.on_round = lambda one: (rounds.append(one), really(one))[1]
    list(arm.engine.generate(world.requests[:4]))
    form = row_form(config, world.target, drafter)
    queue = RoundQueue(
        Packer(form, config.adapt.replay.window, False), 64, slot_bytes_of(config, drafter, form)
    )
    codec: Any = Codec(None, FromServer)
    given: list[float] = []
    taken: list[float] = []
    heads: list[int] = []
    for one in rounds:
        at = time.perf_counter()
        queue.put(one, 1)
        between = time.perf_counter()
        message, bytes_ = queue.next() or (None, None)
        assert isinstance(message, Rounds)
        assert bytes_ is not None
        frames = codec.encode(message)
        decoded, _ = codec.decode(frames)
        really(unpack(decoded, bytes_, form, world.target.vocab_size, "s"))
        given.append(1e3 * (between - at))
        taken.append(1e3 * (time.perf_counter() - between))
        heads.append(len(frames[0]))
        queue.answered(message.number)
    for name, found in (
        ("handed over, ms", given),
        ("taken in, ms", taken),
        ("head, bytes", heads),
    ):
        tenths = statistics.quantiles(found, n=10)
        print(f"{name:16} median {statistics.median(found):.3g}, 90th percentile {tenths[-1]:.3g}")


# --- many servers of a large model ----------------------------------------------------------------------

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
    "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}  # fmt: skip
EAGLE3 = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 12_288, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "draft_vocab_size": 32_000,
    "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
}  # fmt: skip


def tables() -> None:
    """The command that stands in docs/plan.md, with folders that have nothing but sizes."""
    with tempfile.TemporaryDirectory() as name:
        for kind, sizes in (("target", QWEN3_8B), ("draft", EAGLE3)):
            (Path(name) / kind).mkdir()
            (Path(name) / kind / "config.json").write_text(json.dumps(sizes))
        words = [
            f"target.path={name}/target", f"drafter.path={name}/draft", "adapt.placement=sidecar",
            "adapt.sidecar.address=tcp://trainer:29600", "adapt.sidecar.key_file=key",
            "adapt.policy.kind=every_n_rounds", "adapt.policy.rounds=32", "plan.device=h200",
            "plan.servers=[1,8,64,1024]", "plan.link_gb_per_s=12.5", "plan.answer_tokens=2000", "plan.answer_spread=1",
            "plan.frozen_tau=2.5", "plan.learnt_tau=3.0", "plan.learning_updates=200",
        ]  # fmt: skip
        source = ROOT / "configs" / "serve_qwen3_8b_eagle3.yaml"
        subprocess.run(
            command("plan", "-c", source, *words),
            env={**environment(), "COLUMNS": "150"},
            check=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kinds = parser.add_subparsers(dest="what", required=True)
    kinds.add_parser("tables")
    kinds.add_parser("intake")
    one = kinds.add_parser("measure")
    one.add_argument("folder", type=Path)
    one.add_argument("--seconds", type=float, default=40.0)
    one.add_argument("--json", type=Path)
    one = kinds.add_parser("serve")
    one.add_argument("path", type=Path)
    one.add_argument("seconds", type=float)
    one.add_argument("number", type=int)
    one.add_argument("of", type=int)
    one.add_argument("words", nargs="*")
    asked = parser.parse_args()
    match asked.what:
        case "tables":
            tables()
        case "intake":
            intake()
        case "measure":
            measure(asked.folder.absolute(), asked.seconds, asked.json)
        case _:
            serve(asked.path, asked.words, asked.number, asked.of, asked.seconds)


if __name__ == "__main__":
    main()
