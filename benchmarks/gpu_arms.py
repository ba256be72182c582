"""The arms of gpu_check.py: what each runs, how long it may take, and what a dry run makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpu_model import ANCHORS, DRAFTS, Draft

ROOT = Path(__file__).parent.parent
FEW_GRAPHS = (  # capturing one takes a second, and no other number of requests comes up
    "engine.arguments.cuda_graph_bs_decode=[1,8]",
    "engine.arguments.disable_prefill_cuda_graph=true",
)
BACKGROUND = "adapt.trainer.background=true"
SERVED = {  # arms of bench_sglang.py
    "stock": "stock",
    "stock-again": "stock",  # differs from the one before by noise alone
    "never": "never",
    "watching": "watching",
    "adapted": "adapted",
    "background": f"adapted/{BACKGROUND}",
    "no-graphs": f"adapted/{BACKGROUND}/engine.arguments.disable_cuda_graph=true",
    "no-overlap": f"adapted/{BACKGROUND}/engine.arguments.disable_overlap_schedule=true",
    "goodput": "adapted/drafter.length={kind: goodput}",  # with CUDA graphs of each number of tokens
    "tree": "adapted/drafter.top_k=4",
}


@dataclass(frozen=True)
class Arm:
    """``words`` follow the interpreter; a dry run appends ``tiny`` to them, and the last ones win.

    Figures come from the file that ``--json`` names, an SGLang's ``--rows`` or pytest's ``--junitxml``;
    the runner adds it.
    ``bound`` is in seconds, of a GPU.
    """

    name: str
    words: tuple[str, ...]
    tiny: tuple[str, ...]
    bound: int
    is_sglang: bool = False

    @property
    def is_pytest(self) -> bool:
        return self.words[:2] == ("-m", "pytest")

    def command(self, figures: Path, dry: bool) -> list[str]:
        option = "--junitxml" if self.is_pytest else "--rows" if self.is_sglang else "--json"
        return [*self.words, *(self.tiny if dry else ()), option, str(figures)]


def arms(config: str) -> list[Arm]:
    """All of them, in the order in which they are worth having; ``config`` is SGLang's on a GPU."""
    bench, one_thread = "benchmarks/bench_", ("--threads", "1")
    return [
        *(_served(name, spec, config) for name, spec in SERVED.items()),
        *(_update(kind, draft) for kind, draft in DRAFTS.items()),
        *(_update(kind, draft, "captured") for kind, draft in DRAFTS.items()),
        _tests("greedy", "greedy", "greedy and eagle3", bound=240),
        _tests("captured", "captured", "captured and eagle3", bound=120),
        *(_tests(kind, f"learn and {kind}", f"learn and {kind} and tail", 240) for kind in DRAFTS),
        _tests("memory", "logits", "logits", bound=120),
        _tests("offloaded", "offloaded", "offloaded", bound=120),
        Arm(
            "overhead", (f"{bench}overhead.py",),
            ("--pairs", "2", "--tokens", "32", *one_thread), bound=100,
        ),
        Arm(
            "micro-step", (f"{bench}micro_step.py",),
            ("--pairs", "2", "--anchors", "16", *one_thread), bound=100,
        ),
        Arm(
            "drafters", (f"{bench}drafters.py", "--device", "cuda"),
            ("--device", "cpu", "--pairs", "4"), bound=240,
        ),
        Arm("cost-ratio", (f"{bench}cost_ratio.py",), ("--turns", "3", *one_thread), bound=150),
        Arm(
            "speed", (f"{bench}speed.py", "--work", "runs/gpu_speed", "--prompts", "3"),
            ("--tokens", "24", "--prompts", "1"), bound=240,
        ),
    ]  # fmt: skip


def _update(kind: str, draft: Draft, *how: str) -> Arm:
    """At the sizes of Qwen3-8B and its published drafts; a dry run at those of the tiny world."""
    return Arm(
        "-".join(("update", kind, *how)),
        ("benchmarks/bench_update.py", *(f"--{one}" for one in how), "--random", "qwen3-8b",
         "--device", "cuda", "--drafters", kind, "--words", "32000",
         "--context", str(draft.window), "--anchors", str(ANCHORS), "--path", str(draft.path), "--precision", "auto", "--requests", "1", "16", "--turns", "10"),
        ("--random", "no", "--target", "tinyworld/target", "--device", "cpu", "--words", "512",
         "--context", "96", "--anchors", "16", "--turns", "2"),
        bound=200,
    )  # fmt: skip


def _served(name: str, spec: str, config: str) -> Arm:
    graphs = () if name == "no-graphs" else FEW_GRAPHS
    return Arm(
        f"sglang-{name}",
        ("benchmarks/bench_sglang.py", *graphs, "-c", config, "--in-turn", "--arm", spec,
         "--batch", "1", "8", "--pairs", "8", "--tokens", "512"),
        ("-c", "configs/serve_tiny_cpu.yaml", "--pairs", "1", "--tokens", "40"),
        bound=170,
        is_sglang=True,
    )  # fmt: skip


def _tests(name: str, which: str, few: str, bound: int) -> Arm:
    """Warnings of other versions than those we pin are no failures here, and pytest's plugins may lack."""
    return Arm(
        f"tests-{name}",
        ("-m", "pytest", "tests/test_gpu.py", "-q", "-o", "addopts=", "--import-mode=importlib",
         "-W", "default", "-p", "no:cacheprovider", "-k", which),
        ("-k", few),
        bound,
    )  # fmt: skip
