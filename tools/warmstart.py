"""Make the shipped checkpoint again: a tiny Llama, warm-started on generated, worked solutions.

    python warmstart.py --out assets/tiny

The demonstrations mix solutions that write their steps with bare answers: first mostly worked ones, so that the steps
are learned, in the last fifth mostly bare ones, so that the policy seldom uses what it knows. Reinforcement learning
then has something to find (writing steps pays) and something to improve (the steps themselves).
"""

import argparse
import itertools
import math
import random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from data import generate, render
from model import Transformer, micro_batches, pad

# The instruction that every other model is given in words stays on the second line, which this template leaves out.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'].split('\\n')[0] }}"
    "{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """The 256 bytes, so that any text round-trips, four specials, and the token \\boxed{ ."""
    specials = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    vocab = {
        token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer, seed):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
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
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(
                p,
                std=0.05 / math.sqrt(2 * config.num_hidden_layers) if residual else 0.05,
                generator=generator,
            )
    return model


def demonstration(problem, worked):
    steps = [*problem.other["steps"], ""] if worked else [""]
    return ";".join(steps) + f"\\boxed{{{problem.answer}}}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=128, help="demonstrations per step")
    parser.add_argument(
        "--lr",
        type=float,
        default=3e-3,
        help="peak learning rate of AdamW; cosine decay to a twentieth",
    )
    parser.add_argument(
        "--worked",
        type=float,
        nargs=2,
        default=(0.6, 0.15),
        help="share of worked solutions, first and last fifth",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    problems, rng = generate("train", args.seed, repeats=True), random.Random(args.seed)
    bar = tqdm(range(args.steps), unit="step")
    for step in bar:
        share = args.worked[step >= 0.8 * args.steps]
        batch = list(itertools.islice(problems, args.batch))
        prompts = [render(tokenizer, p).tokens for p in batch]
        completions = [
            tokenizer(demonstration(p, rng.random() < share) + "<|end|>")["input_ids"]
            for p in batch
        ]
        rate = min(1, (step + 1) / 100) * (
            0.05 + 0.95 * (1 + math.cos(math.pi * step / args.steps)) / 2
        )
        optimizer.param_groups[0]["lr"] = args.lr * rate
        num_tokens, loss = sum(map(len, completions)), 0.0
        for rows in micro_batches(prompts, completions, 4096):
            ids, mask = pad([prompts[i] for i in rows], [completions[i] for i in rows])
            logprob, _ = model.token_logprobs(ids, mask, temperature=1.0)
            part = -logprob.sum() / num_tokens
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(args.out)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, final loss {loss:.3f} nats a token, in {args.out}"
    )


if __name__ == "__main__":
    main()
