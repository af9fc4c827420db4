"""Make the shipped checkpoint again: a tiny Llama, warm-started on generated, worked solutions.

    python -m experiments.warmstart --out assets/tiny

The solutions are those of a student who makes systematic mistakes (experiments/problems.py), as in
studies of arithmetic (Brown & Burton 1978). First the mistakes are rare, so that every kind of
step is learned. Then they come in full. Reinforcement learning has to find out, kind by kind, which
of two ways is right.
"""

import itertools
import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from data import render
from experiments.problems import generate, solve
from model import Transformer, pad

PEAK_LR = 3e-3  # of AdamW
TRAPS = "carry", "borrow", "sign"
RARE = 0.2  # at first, slips are so many times as frequent

# The second line of a problem tells other models in words what to do. This template leaves it out.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'].split('\\n')[0] }}"
    "{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """The 256 bytes, so that any text round-trips, four special tokens, and the token \\boxed{ ."""
    specials = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer, seed):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.05
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # these add to the residual
                std /= math.sqrt(2 * config.num_hidden_layers)
            torch.nn.init.normal_(p, std=std, generator=generator)
    return model


def demonstrations(args):
    """For every step of training, pairs (problem, solution as text).  args: a Recipe"""
    problems, rng = generate("train", args.seed, True, args.deepest), random.Random(args.seed)
    for step in range(args.steps):
        scale = RARE if step < args.rare * args.steps else 1
        slips = {trap: scale * rate for trap, rate in zip(TRAPS, args.slips)}
        pairs = []
        for problem in itertools.islice(problems, args.batch):
            parts, answer = solve(problem.problem, slips, args.careful, rng)
            pairs.append((problem, ";".join([*parts, f"\\boxed{{{answer}}}"])))
        yield pairs


def relative_rate(step, steps):
    """Of the learning rate to its peak: 100 steps of warm-up, times a cosine down to a twentieth"""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1, (step + 1) / 100) * (0.05 + 0.95 * cosine)


def learn(model, tokenizer, batches, steps):
    """Maximise the likelihood of the demonstrations; returns the last loss, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, (0.9, 0.98), weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: relative_rate(step, steps))
    for batch in tqdm(batches, total=steps):
        prompts = [render(tokenizer, problem).tokens for problem, _ in batch]
        completions = [tokenizer(solution + "<|end|>")["input_ids"] for _, solution in batch]
        ids, learned = pad([p + c for p, c in zip(prompts, completions)])
        for row, prompt in zip(learned, prompts):
            row[: len(prompt)] = False
        logits = model(ids[:, :-1])[learned[:, 1:]]
        loss = F.cross_entropy(logits, ids[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


@dataclass
class Recipe:
    """The flags"""

    out: str  # folder to write
    steps: int = 1800  # of the optimizer
    batch: int = 128  # demonstrations per step
    seed: int = 0
    slips: list[float] = field(default_factory=lambda: [0.45, 0.65, 0.75])  # how often, see TRAPS
    careful: float = 0.35  # share of the steps that have their units worked out
    rare: float = 0.6  # share of the steps in which slips are rare
    deepest: int = 0  # of problems, see generate
    start: str | None = None  # checkpoint folder to go on from; default: random weights


def main(arguments=None):
    (args,) = HfArgumentParser(Recipe).parse_args_into_dataclasses(arguments)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    if args.start:
        model = Transformer.from_pretrained(args.start, torch.float32, "cpu")
    loss = learn(model, tokenizer, demonstrations(args), args.steps)
    stop, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    for part in (model, tokenizer, GenerationConfig(eos_token_id=stop, pad_token_id=padding)):
        part.save_pretrained(args.out)
    print(f"{args.out}: final loss {loss:.3f} nats per token")


if __name__ == "__main__":
    main()
