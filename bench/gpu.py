"""The rows of bench/gpu.sh, each a process of its own, and what they should be by arithmetic:

    python bench/gpu.py --row decoding --out DIR ...      prints lines of JSON
    python bench/gpu.py --arithmetic                      what cards should need

A row prints what it has measured as soon as it has it: the time limit may end it.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import shared
import torch
from safetensors.torch import load_file
from shared import say
from torch.profiler import profile

from common.files import squash
from model import Transformer
from policy.checkpoint import find_folder
from policy.learner import MICRO_BATCH_TOKENS
from policy.memory import free_bytes
from policy.packed import packed
from rollout import Slots, capture, stream_key
from run.processes import keep_freed_memory

SMALL_RUN = """--model {out}/small --out {out}/{name} --device {device} --dtype float32 --quality 1
--filter all --length-weight 0 --group-size 4 --buffer-groups 4 --lr 1e-3 --warmup 0 --updates 2
--max-new-tokens 48 --save-every 1 --keep-checkpoints 2 --eval-every 0
--reward bench/shared.py:reward"""
FULL = "-c 'import torch, train; torch.cuda.set_per_process_memory_fraction(0.01); train.main()'"


def card(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no card; DEVICE=cpu SIZE=2m NEW=8 tries the script without one")
    driver = subprocess.getoutput(
        "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    )
    disk = shutil.disk_usage(args.out).free
    say(torch=torch.__version__, card_and_driver=driver, free_disk_bytes=disk)
    say(free_bytes=free_bytes(torch.device(args.device)), bytes_per_second=bandwidth(args))
    say(product_flops_per_second=shared.product_speed(args))


def model(args):
    """The model of all rows but the last, in a folder, and a small one for these."""
    shared.make_model("2m" if args.size == "2m" else "135m", f"{args.out}/small")
    folder = Path(args.out, "model")
    try:
        if args.because:
            raise ValueError(args.because)
        folder.symlink_to(find_folder(args.model).resolve())  # --out is new
        say(model=args.model)
    except ValueError as error:
        size = next((size for size in shared.SIZES if f"-{size}" in args.model.lower()), args.size)
        shared.make_model(size, folder, getattr(torch, args.dtype), args.device)
        say(random_weights_of_the_shape=size, because=squash(str(error)))


@torch.inference_mode()
def decoding(args):
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), args.device)
    for slots, length in product((64, 256), (args.new_tokens, 8 * args.new_tokens)):
        try:
            with packed(model, slots):
                decode(args, model, slots, length)
        except torch.OutOfMemoryError:
            say(slots=slots, positions=length, fits=False)


def decode(args, model, slots, length):
    """A step of slots that have read `length` positions."""
    keys = [stream_key(0, i) for i in range(slots)]
    work = Slots(model, [[5] * length], [keys], [[64] * slots], slots)

    def step():
        work.advance(1.0, 0, 1.0)
        work.decode()

    work.refill()
    step()
    with profile() as seen:
        logits = work.forward()
    apart = (logits - work.replay()).abs().max() / logits.abs().max()
    assert apart < 0.01, f"captured logits differ by {apart:.2g} of the largest"
    captured = shared.seconds(work.replay, 5)
    read = sum(x.nbytes for x in [*model.model.layers.parameters(), model.lm_head.weight])
    read += sum(x.nbytes for x in work.cache.k + work.cache.v) * length / work.cache.room
    names = [event.key for event in seen.key_averages()]
    names = [name for name in names if re.search("flash|fmha|attention|softmax", name)]
    say(
        slots=slots,
        positions=length,
        eager_seconds=shared.seconds(work.forward, 5),
        captured_seconds=captured,
        share_of_bandwidth=read / captured / bandwidth(args),
        tokens_per_second=slots / shared.seconds(step, 5),
        capture_seconds=shared.seconds(lambda: capture(work.forward, model.device)),
        attention=sorted(names, key=lambda name: name.startswith("aten"))[:1],
    )


def bandwidth(args):
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=args.device)
    target = source.clone()
    return 2 * source.nbytes / shared.seconds(lambda: target.copy_(source), 5)


def start(command, wait=False):
    """A process of Python. Where it is waited for and fails, this row fails, too."""
    process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=shared.ROOT)
    if wait and process.wait():
        sys.exit(1)
    return process


def small_run(args, name, launch="train.py", wait=True):
    return start(f"{launch} {SMALL_RUN.format(name=name, **vars(args))}", wait)


def fsdp(args):
    """Of one process, and of as many as there are cards."""
    small_run(args, "one")
    for count in sorted({1, torch.cuda.device_count() or 2}):
        launch = f"-m torch.distributed.run --nproc_per_node={count} train.py --fsdp"
        small_run(args, f"fsdp{count}", launch)
        compare(args, f"fsdp{count}")


def resume(args):
    """A run that was killed and went on, beside one that was not."""
    process = small_run(args, "killed", wait=False)
    while process.poll() is None and not Path(args.out, "killed/checkpoints/000001").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()  # its lock ends with it
    start(f"train.py --resume {args.out}/killed", wait=True)
    compare(args, "killed")


def compare(args, name):
    """The weights of a run with those of `one`: how far apart, by how far the latter moved."""
    folders = "small", "one/checkpoints/000002", f"{name}/checkpoints/000002"
    begun, end, other = (
        torch.cat([x.flatten() for x in load_file(path).values()])
        for path in (f"{args.out}/{folder}/model.safetensors" for folder in folders)
    )
    apart = ((end - other).norm() / (end - begun).norm()).item()
    say(run=name, weights_differ_by=apart)
    assert apart <= (1e-3 if args.device == "cpu" else 0.1), "that is more than rounding"


def full(args):
    if args.device == "cpu":
        return say(left_out="without a GPU")
    code = small_run(args, "full", FULL, wait=False).wait()
    log = Path(args.out, "full.log").read_text()
    say(exit_code=code, last_line=log.splitlines()[-1])
    assert code == 1 and "out of memory" in log and "Traceback" not in log, "not one line, code 1"


ROWS = {
    "card": card,
    "model": model,
    "decoding": decoding,
    "fsdp": fsdp,
    "resume": resume,
    "full": full,
}

# -------------------------------------------------------------------------------------- arithmetic

# GB/s of memory, TFLOP/s of dense bfloat16 products, GiB: the makers' data sheets.
CARDS = {
    "RTX 4080": (717, 97, 16),
    "RTX 4090": (1008, 165, 24),
    "A100 80 GB": (2039, 312, 80),
    "H100": (3350, 989, 80),
}
# Kernels of a decoded step: of a layer, of one with LoRA, and those beside the layers. Counted on a
# pretended device with the 28 layers of Qwen2.5-1.5B: 549. LoRA adds two products to each of the
# seven linear layers, so 941 follow.
KERNELS = 19, 33, 17
LAUNCH = 2e-6  # seconds from one kernel of a graph to the next
MFU = 0.4  # of the peak of products, while learning
COMPLETIONS = 256  # of an update; all have the same length


def expect(card, size, lora, tokens):
    """What a card should need, as text."""
    speed, peak, memory = CARDS[card]
    hidden, inner, layers, heads, kv_heads, vocabulary = shared.numbers(size)
    kv = 2 * hidden // heads * kv_heads  # numbers of a token's key and value in one layer
    head = hidden * vocabulary
    met = layers * hidden * (2 * hidden + kv + 3 * inner) + head  # weights that a token meets
    held = met + head * (size == "7b")  # its embedding is not the head
    # bytes: weights, and in full training masters, moments; while learning gradients
    free = memory * 2**30 - 1e9 - (2 if lora else 14) * held
    learner = free - (0 if lora else 4) * held
    row = 2 * layers * kv * tokens  # of the KV cache
    most = min(COMPLETIONS, int(free / 2 / row) // 8 * 8)
    kept = 2 * layers * (4 * inner + 6 * hidden)  # a token, if no layer is computed again
    again = learner < 1.25 * MICRO_BATCH_TOKENS["cuda"] * kept
    if most < 8 or learner < tokens * (2 * layers * hidden + kept / layers):
        return "-"

    def step(slots, filled):
        launches = (layers * KERNELS[lora] + KERNELS[2]) * LAUNCH
        products = max(2 * met / (1e9 * speed), 2 * met * slots / (1e12 * peak))
        return products + slots * row * filled / (1e9 * speed) + launches

    waves, last = divmod(COMPLETIONS, most)
    sampling = tokens * (waves * step(most, 0.5) + bool(last) * step(last, 0.5))
    frozen = 2 * lora * met  # have no gradient of their own
    attention = layers * hidden * tokens  # all that a token multiplies with, but for weights
    flops = (6 + 2 * again) * (met + attention) - frozen  # of a token
    learning = COMPLETIONS * tokens * flops / (MFU * 1e12 * peak)
    full = step(most, 1)
    times = f"{sampling:.0f} + {learning:.0f} s{' *' * again}"
    return f"{most}: {1e3 * full:.1f} ms, {most / full / 1e3:.1f} k/s; {times}"


def arithmetic():
    print(f"| size, training, tokens | {' | '.join(CARDS)} |\n| --- | --- | --- | --- | --- |")
    for size, lora, tokens in product(("0.5b", "1.5b", "7b"), (False, True), (1024, 8192)):
        cells = [expect(card, size, lora, tokens) for card in CARDS]
        print(f"| {size}, {'LoRA' if lora else 'full'}, {tokens} | {' | '.join(cells)} |")


def main():
    keep_freed_memory()
    flags = {"row": "", "size": "1.5b", "out": "", "new_tokens": 1024, "because": ""}
    args = shared.parse(__doc__, **shared.MODEL, **flags, arithmetic=False)
    if args.arithmetic:
        arithmetic()
    else:
        if args.row not in ("card", "model"):
            args.model = f"{args.out}/model"
        ROWS[args.row](args)


if __name__ == "__main__":
    main()
