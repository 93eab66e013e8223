"""Compare quantizers: round-to-nearest, llm-compressor, GPTQModel, auto-round and qsun.

    python -m tests.compare_peers RECORD STATE [--base FOLDER] [--prefill math=FOLDER ...]
        [--bits 4,3,2] [--samples 32] [--subjects NAMES] [--again NAMES] [--iterations 20]
        [--rows 64] [--tests 64] [--measures likelihood,perplexity,answers] [--only-make]

All get the same samples, group size 64 and no head, and quantize SmolLM2-135M-Instruct or the model
of `--base`, each in a process of its own. qsun alone also gets the prefill modules, of those tasks
that its samples are of. Then each is judged by `tests/judging.py`. What is done stays done in
STATE: made there, judged there; `--again` names whose results are made anew. `make peers` first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from qsun.calibrate.definition import load_definition
from qsun.calibrate.samples import read_sources, tokenize_sources
from qsun.config import load_config
from qsun.files import write_json
from qsun.models import load_model, load_tokenizer
from qsun.progress import announce
from qsun.records import new_record
from tests.judging import REFERENCE, Judging, lower_by, mean
from tests.peers.request import COST, Request
from tests.peers.subjects import OURS, SUBJECTS, options

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "smollm2-135m-w4.yaml"
CALIBRATION = ROOT / "calib" / "math-tools-served.yaml"
PREFILL = {name: REFERENCE / name for name in ("math", "tools", "code")}
GROUP_SIZE = 64
FULL = "full precision"
MEASURES = ("likelihood", "perplexity", "answers")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One model's comparison in its state folder."""

    state: Path
    base: Path
    samples: int
    prefill: Mapping[str, Path]
    iterations: int

    def folder(self, name: str, bits: int) -> Path:
        """Where a subject's checkpoint lies, or will."""
        return self.state / "made" / f"{name}-w{bits}-{self.samples}"

    def judged(self, name: str, bits: int) -> Path:
        """Where a subject's judgement lies, or will."""
        label = "full" if name == FULL else self.folder(name, bits).name
        return self.state / "judged" / f"{label}.json"

    def write_texts(self) -> dict[str, Any]:
        """Write calibration text, config and samples for all subjects; gives the samples' counts.

        qsun's modules are those of the text's sources.
        """
        self.state.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_load(CALIBRATION.read_text(encoding="utf-8")) | {"samples": self.samples}
        self._text.write_text(yaml.safe_dump(text), encoding="utf-8")
        config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        config["base"] = {"model": str(self.base)}
        config["quantize"]["calibration"] = str(self._text)
        config["quantize"]["heldout"] = str(ROOT / "calib" / "heldout.yaml")
        self._config.write_text(yaml.safe_dump(config), encoding="utf-8")
        definition = load_definition(self._text)
        sources = read_sources(definition, CALIBRATION.parent)
        found = tokenize_sources(sources, definition, load_tokenizer(self.base))
        write_json(self._tokens, found.tokens)
        return found.summary()

    def make(self, name: str, bits: int) -> None:
        """Quantize, if that is not done; an older judgement goes."""
        out = self.folder(name, bits)
        if (out / COST).exists():
            return
        announce(f"{name}, {bits} bits")
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        self.judged(name, bits).unlink(missing_ok=True)
        served = {
            source.name: self.prefill[source.name]
            for source in load_definition(self._text).sources
            if source.name in self.prefill
        }
        settings = options(name, bits, self._config, self._text, served, self.iterations)
        samples = json.loads(self._tokens.read_text(encoding="utf-8"))
        request = out.with_suffix(".request.json")
        Request(str(self.base), samples, bits, GROUP_SIZE, settings).write(request)
        SUBJECTS[name].run(request, out, out.with_suffix(".log"))

    def judge(self, name: str, bits: int, judging: Judging, measures: list[str]) -> None:
        """Take what measures are missing, each kept as soon as it is there."""
        path, what = self.judged(name, bits), f"{name}, {bits} bits" if bits else name
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.parent.mkdir(exist_ok=True)
        missing = [one for one in measures if kept.get(one, {}).get("of") != self._of(one, judging)]
        if not missing:
            return
        if name == FULL:
            decode = load_model(self.base, "bfloat16")
        else:
            decode = SUBJECTS[name].load(self.folder(name, bits), self.base, bits)
        take: dict[str, Callable[[], Any]] = {
            "likelihood": lambda: judging.likelihoods(decode, what),
            "perplexity": lambda: judging.perplexity(decode, what),
            "answers": lambda: judging.answers(decode),
        }
        for measure in missing:
            kept[measure] = {"of": self._of(measure, judging), "found": take[measure]()}
            write_json(path, kept)

    def _of(self, measure: str, judging: Judging) -> int:
        """How many rows a measure is of, at most; 0 where that is not asked."""
        return {"likelihood": judging.rows, "answers": judging.tests}.get(measure, 0)

    def found(self, name: str, bits: int) -> dict[str, Any]:
        """A subject's measures, as far as they are there."""
        path = self.judged(name, bits)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {measure: one["found"] for measure, one in kept.items()}

    @property
    def _text(self) -> Path:
        return self.state / f"calibration-{self.samples}.yaml"

    @property
    def _tokens(self) -> Path:
        return self.state / f"samples-{self.samples}.json"

    @property
    def _config(self) -> Path:
        return self.state / "run.yaml"


def main() -> None:
    """Make, judge, record."""
    asked = arguments()
    names = asked.subjects.split(",")
    state = asked.state.resolve()
    base = (asked.base or converted(state)).resolve()
    given = dict(one.split("=", 1) for one in asked.prefill)
    prefill = {task: Path(path).resolve() for task, path in given.items()} or PREFILL
    comparison = Comparison(state, base, asked.samples, prefill, asked.iterations)
    refuse(names, prefill)
    samples = comparison.write_texts()
    pairs = [(name, int(bits)) for bits in asked.bits.split(",") for name in names]
    for name, bits in pairs:
        if name in asked.again.split(","):
            shutil.rmtree(comparison.folder(name, bits), ignore_errors=True)
        comparison.make(name, bits)
    if asked.only_make:
        return
    judging = Judging(base, prefill, asked.rows, asked.tests)
    for measure in asked.measures.split(","):
        for name, bits in [(FULL, 0), *pairs]:
            comparison.judge(name, bits, judging, [measure])
    run = load_config(CONFIG)
    named = dataclasses.replace(run.base, model=base.name if asked.base else run.base.model)
    result = {
        "samples": samples,
        "rows": asked.rows,
        "tests": asked.tests,
        "response_tokens": {task: int(n.sum()) for task, n in judging.tokens.items()},
        FULL: summary(comparison.found(FULL, 0), judging),
        "bits": {
            f"w{bits}": dict(results(comparison, names, int(bits), judging))
            for bits in asked.bits.split(",")
        },
    }
    config = dataclasses.replace(run, base=named)
    new_record("peers-comparison", config, run.seed, result).write(asked.record)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("state", type=Path, help="a folder that keeps what is done")
    parser.add_argument("--base", type=Path, help="a checkpoint's folder in SmolLM2's place")
    parser.add_argument(
        "--prefill", action="append", default=[], help="TASK=FOLDER, again and again"
    )
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--again", default="", help="subjects to make anew")
    parser.add_argument("--iterations", type=int, default=20, help="of auto-round, a block")
    parser.add_argument("--rows", type=int, default=64, help="validation rows of each task")
    parser.add_argument("--tests", type=int, default=64, help="prompts of each test set")
    parser.add_argument("--measures", default=",".join(MEASURES))
    parser.add_argument("--only-make", action="store_true", help="judge another time")
    return parser.parse_args()


def refuse(names: list[str], prefill: Mapping[str, Path]) -> None:
    """Refuse what cannot be run, before anything is."""
    problems = [f"{name}: one of {', '.join(SUBJECTS)}" for name in names if name not in SUBJECTS]
    found = [SUBJECTS[name].missing() for name in names if name in SUBJECTS]
    problems += [one for one in found if one]
    problems += [f"{path} is missing" for path in prefill.values() if not path.exists()]
    if problems:
        raise SystemExit("\n".join(problems))


def converted(state: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint's folder, converted once."""
    from qsun.files import publish_folder
    from qsun.gguf_file import convert_gguf
    from qsun.models import locate

    base = state / "smollm2-135m-instruct"
    if not base.exists():
        run = load_config(CONFIG)
        source = locate(run.base.model, run.base.revision, CONFIG.parent)
        assert source.gguf is not None
        state.mkdir(parents=True, exist_ok=True)
        with publish_folder(base) as folder:
            convert_gguf(source.gguf, folder, "bfloat16")
    return base


def results(
    comparison: Comparison, names: list[str], bits: int, judging: Judging
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every subject's cost, measures, and how qsun's compare."""
    ours = comparison.found(OURS, bits)
    for name in names:
        found = comparison.found(name, bits)
        cost = json.loads((comparison.folder(name, bits) / COST).read_text(encoding="utf-8"))
        result = {"cost": cost, **summary(found, judging)}
        if name != OURS and ours:
            result["qsun"] = compared(ours, found, judging)
        yield name, result


def summary(found: Mapping[str, Any], judging: Judging) -> dict[str, Any]:
    """A subject's measures, summed up over rows."""
    told: dict[str, Any] = {}
    if "likelihood" in found:
        told["nats_per_token"] = {
            task: mean(values, judging.tokens[task]) for task, values in found["likelihood"].items()
        }
    if "perplexity" in found:
        told["perplexity"] = found["perplexity"]
    if "answers" in found:
        told["right"] = {test: sum(one) / len(one) for test, one in found["answers"].items()}
    return told


def compared(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], judging: Judging
) -> dict[str, Any]:
    """By how much qsun's nats per token are lower and its right answers more, with intervals."""
    told: dict[str, Any] = {}
    if "likelihood" in ours and "likelihood" in theirs:
        told["lower_by"] = {
            task: lower_by(values, theirs["likelihood"][task], judging.tokens[task])
            for task, values in ours["likelihood"].items()
        }
    if "answers" in ours and "answers" in theirs:
        told["more_right_by"] = {
            test: lower_by(theirs["answers"][test], one, ones(len(one)))
            for test, one in ours["answers"].items()
        }
    return told


def ones(count: int) -> Any:
    """The weights of rows that count alike."""
    import numpy as np

    return np.ones(count)


if __name__ == "__main__":
    main()
