"""Ask one question of the base model, of the naive hand-off and of SUN.

    python examples/same_question.py [--question N] [--reference exports/reference]

The task's N-th test problem goes to the base model alone; to a fine-tuned model's prefill handed to
the base decoder, which was never tuned for that; and to the math module that `qsun tune` made
through that very decoder. The decoder is the same frozen base model each time. Problem 6 is one
that the module gets right; the README says how often it does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from qsun.chats import encode_prompts
from qsun.config import load_config
from qsun.generation import Sampling, generate
from qsun.models import checkpoint_folder, load_model, load_tokenizer, locate, read_config
from qsun.models import serving_dtype as dtype_of
from qsun.prefill_module import load_prefill
from qsun.quiet import quiet_libraries
from qsun.skeleton import skeleton
from qsun.tasks.checkers import CHECKERS
from qsun.tasks.definition import load_task
from qsun.tasks.examples import read_tests

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "smollm2-135m-sun.yaml"
SHOWN_LINES = 8
TASK = ROOT / "calib" / "tasks" / "math.yaml"


def main() -> None:
    """Open the base model and both modules, ask, and print each answer with its verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", type=int, default=6, help="number of the test problem")
    parser.add_argument("--reference", type=Path, default=ROOT / "exports" / "reference")
    arguments = parser.parse_args()
    quiet_libraries()
    run, task = load_config(CONFIG), load_task(TASK)
    example = read_tests(task, TASK.parent)["seen"][arguments.question]
    source = locate(run.base.model, run.base.revision, CONFIG.parent)
    config = read_config(source)
    dtype = dtype_of(config)
    with tempfile.TemporaryDirectory() as scratch:
        base = checkpoint_folder(source, skeleton(config), Path(scratch), dtype)
        tokenizer, decode = load_tokenizer(base), load_model(base, dtype)
        prefills = {
            "base model alone": decode,
            "naive hand-off": load_prefill(arguments.reference / "math-full-ft", base, dtype),
            "SUN": load_prefill(arguments.reference / "math", base, dtype),
        }
    prompts = encode_prompts([(example.messages, example.source)], tokenizer)
    print(f"{example.text}\n\n(right: {example.answer})")
    for name, prefill in prefills.items():
        sampling = Sampling(max_new_tokens=task.max_new_tokens)
        tokens = generate(prefill, decode, tokenizer, prompts, sampling)[0]
        response = tokenizer.decode(tokens, skip_special_tokens=True)
        right = CHECKERS[str(task.checker)]([response], [example.answer])[0]
        print(f"\n--- {name}: {'right' if right else 'wrong'}\n{shortened(response)}")


def shortened(response: str) -> str:
    """The first lines: the base model goes on until it may not."""
    lines = [line for line in response.splitlines() if line.strip()]
    return "\n".join(lines[:SHOWN_LINES] + ["..."] * (len(lines) > SHOWN_LINES))


if __name__ == "__main__":
    main()
