"""An acceptance test of one GPU, as one table: bench/gpu.sh runs it.

Every row is printed as soon as it is measured. A part that fails is a row that says why, and costs
none of the others. The exit code is 1 if a row says NO.
"""

import functools
import subprocess
import sys
import time
from pathlib import Path

import common
import step
import torch
from safetensors.torch import load_file

from data import read_problems
from policy.checkpoint import SHIPPED
from policy.packed import packed
from rollout import Slots, stream_key
from train import MOST_GAP

FLAGS = """--quality 1 --filter all --length-weight 0 --group-size 4 --buffer-groups 4 --lr 1e-3
--warmup 0 --max-new-tokens 48 --updates 3 --save-every 1 --keep-checkpoints 3 --eval-every 0
--dtype float32 --reward bench/common.py:reward"""
ENDS = "small", "whole/checkpoints/000003", "killed/checkpoints/000003"


# Each part -> what was measured, what it should be, whether it is. It is named by its docstring.
# `made` loads the model at the first call.


def logprob_gap(args, made):
    """learner less sampler, nats a token"""
    update, _ = step.one_update(made())
    first, most = update.steps[0], MOST_GAP[args.dtype]
    gap = first["gap"] / first["fresh"]
    return f"{gap:.2g}", f"at most {most:g}", gap <= most


def phases(args, made):
    """an update after the first one, by phases"""
    update, seconds = step.one_update(made())
    parts = ", ".join(f"{name} {some:.2f} s" for name, some in update.seconds.items())
    return f"{parts}; {update.total('tokens') / seconds:,.0f} tokens a second", "", True


@torch.inference_mode()
def decoding(args, made):
    """a decoding step as it is, and captured"""
    model, rows = made().policy.model, args.slots
    # Every row has read 512 tokens.
    work = Slots(model, [[5] * 512], [[stream_key(0, i) for i in range(rows)]], [9], rows)
    with packed(model, rows):
        work.refill()
        work.advance(1.0, 0, 1.0)
        work.decode()
        logits = work.forward()
        difference = (logits - work.replay()).abs().max() / logits.abs().max()
        plain, captured = (common.seconds(s, 20) for s in (work.forward, work.replay))
    weights = [*model.model.layers.parameters(), model.lm_head.weight]
    read = sum(tensor.nbytes for tensor in weights)
    read += sum(tensor.nbytes for tensor in work.cache.k + work.cache.v)
    share = read / captured / bandwidth(args.device)
    measured = f"{1e3 * plain:.1f} ms, {1e3 * captured:.1f} ms; logits differ by {difference:.1g}; "
    measured += f"{rows / captured:,.0f} tokens a second, {share:.0%} of the memory's bandwidth"
    return measured, "logits within 0.01 of the largest", difference.item() < 0.01


def bandwidth(device):
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * source.nbytes / common.seconds(lambda: target.copy_(source), 5)


def resuming(args, _):
    """a run that was killed and went on, beside one that was not"""
    assert small_run(args, "whole", "train.py").wait() == 0
    process = small_run(args, "killed", "train.py")
    while not Path(args.out, "killed/checkpoints/000001").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0, "it ended before it was killed"
    assert start(args, "train.py", "--resume", f"{args.out}/killed").wait() == 0
    begun, end, other = (weights(f"{args.out}/{name}") for name in ENDS)
    difference = ((end - other).norm() / (end - begun).norm()).item()
    most = 1e-3 if args.device == "cpu" else 0.1
    measured = f"weights differ by {difference:.2g} of how far they moved"
    return measured, f"at most {most:g}", difference <= most


def full_memory(args, _):
    """a GPU without memory"""
    if args.device == "cpu":
        return "left out without a GPU", "", True
    limited = "import torch, train; torch.cuda.set_per_process_memory_fraction(0.01); train.main()"
    code = small_run(args, "full", "-c", limited).wait()
    said = Path(args.out, "log").read_text()
    good = code == 1 and "out of memory" in said and "Traceback" not in said
    return said.splitlines()[-1], "one line, exit code 1", good


def small_run(args, out, *program):
    files = "--model", f"{args.out}/small", "--out", f"{args.out}/{out}"
    return start(args, *program, *files, "--device", args.device, *FLAGS.split())


def start(args, *words):
    """A process of Python. The log has its errors."""
    command = [sys.executable, *words]
    with open(Path(args.out, "log"), "w") as log:
        return subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.DEVNULL, stderr=log)


def weights(folder):
    tensors = load_file(f"{folder}/model.safetensors").values()
    return torch.cat([tensor.flatten() for tensor in tensors])


def main():
    args = common.parse(
        __doc__,
        **common.MODEL,
        out="",
        prompts=8,
        group=8,
        new_tokens=1024,
        slots=64,
    )
    problems = read_problems(SHIPPED / "train.jsonl")[: args.prompts]
    made = functools.cache(lambda: step.make_run(args, problems))
    print("| what | measured | should be | is it |\n| --- | --- | --- | --- |", flush=True)
    failed = False
    for part in (logprob_gap, decoding, phases, resuming, full_memory):
        try:
            measured, bound, good = part(args, made)
        except Exception as error:
            measured, bound, good = f"{type(error).__name__}: {error}", "", False
        failed |= not good
        print(f"| {part.__doc__} | {measured} | {bound} | {'yes' if good else 'NO'} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
