"""A policy as it is read from a checkpoint folder, and written to one."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, is_dataclass
from itertools import chain
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

import data
from common.files import explained, sha256
from model import Transformer, weight_files
from policy import lora

# A tiny checkpoint, and its problems with pass rates
SHIPPED = Path(__file__).parents[1] / "assets"
TINY = SHIPPED / "tiny"


@dataclass(frozen=True)
class Policy:
    """A model with what turns problems into its tokens and its tokens into text."""

    model: Transformer
    tokenizer: object
    stop_ids: tuple
    folder: Path  # where it was read
    prompting: dict  # keyword arguments of data.render

    @classmethod
    def load(cls, name, dtype="float32", device="cpu", flags=data.Prompting()):  # noqa: B008 frozen
        """From a checkpoint folder or a hub name. An adapter is put on the base that it names.

        Raises ValueError saying what is wrong.
        """
        folder = find_folder(name)
        adapter = lora.read_config(folder)
        base = find_folder(adapter["base_model_name_or_path"]) if adapter else folder
        prompting = data.read_prompting(flags)
        model = Transformer.from_pretrained(base, getattr(torch, dtype), device)
        if adapter:
            lora.load(model, adapter, folder)
        with explained(f"{folder}: its tokenizer cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.encode("1")  # fails for a bad model_max_length
        tokenizer.clean_up_tokenization_spaces = False  # text is graded as it was written
        check_round_trip(folder, tokenizer)
        # --template, or for a tokenizer without a template of its own the plain one.
        own = tokenizer.chat_template
        text = prompting["template"].pop("chat_template", None if own else data.PLAIN_TEMPLATE)
        if text is not None:
            tokenizer.chat_template = data.with_bos(tokenizer, text)
        stop_ids = read_stop_ids(folder, tokenizer, model.config)
        stop_ids |= {end_of_turn(tokenizer), *(stop_token(tokenizer, text) for text in flags.stop)}
        return cls(model, tokenizer, tuple(sorted(stop_ids - {None})), folder, prompting)

    def save(self, folder):
        """Write what stands beside the weights in a folder that `load` reads."""
        self.tokenizer.save_pretrained(folder)
        GenerationConfig(
            eos_token_id=list(self.stop_ids), pad_token_id=self.tokenizer.pad_token_id
        ).save_pretrained(folder)

    def render(self, problems):
        """[Problem, ...] -> [Prompt, ...]. Raises ValueError if a prompt does not fit the model."""
        with explained("the chat template (or --template) fails"):
            prompts = [data.render(self.tokenizer, p, **self.prompting) for p in problems]
        vocab_size = self.model.config.vocab_size
        for prompt in prompts:
            if not prompt.tokens:
                raise ValueError(f"{prompt.problem.id!r}: the chat template makes an empty prompt")
            if max(prompt.tokens) >= vocab_size:
                raise ValueError(
                    f"{prompt.problem.id!r}: token {max(prompt.tokens)} is not in the model's "
                    f"vocabulary of {vocab_size}: model and tokenizer do not belong together"
                )
        return prompts

    def show(self, name, prompts, longest):
        """Print two examples as the model sees them, and how many leave little room to answer.

        name     of the file or set
        longest  tokens of a completion at most
        """
        for prompt in prompts[:2]:
            text = self.tokenizer.decode(prompt.tokens)
            tqdm.write(f"{prompt.problem.id!r}, gold {prompt.problem.answer!r}: {text!r}")
        rooms = list(map(self.room, prompts))
        if too_long := rooms.count(0):
            tqdm.write(
                f"{name}: {too_long} of {len(prompts)} prompts fill the context and count as wrong"
            )
        if short := sum(0 < room < longest for room in rooms):
            tqdm.write(
                f"{name}: {short} of {len(prompts)} prompts leave less than the {longest} tokens "
                f"of a completion in the context of {self.model.context}"
            )

    def room(self, prompt):
        """Tokens that the context leaves for a completion; 0: the prompt is too long."""
        return max(0, self.model.context - len(prompt.tokens))

    def limit(self, prompt, max_new_tokens):
        """Return how many tokens a completion may have: Len_l, or fewer where the context ends. If
        the prompt fills the context, its completions are empty."""
        return min(max_new_tokens, self.room(prompt))

    def text(self, completion):
        tokens = completion.tokens[: len(completion.tokens) - completion.stopped]
        return self.tokenizer.decode(tokens)


def digest(value):
    """A hash of a value as JSON. Of what is none, an image of a data set, only its type counts: its
    text would tell its place in memory."""
    text = json.dumps(value, default=lambda x: vars(x) if is_dataclass(x) else type(x).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_digest(folder):
    """A hash of the files of weights of a checkpoint, or of an adapter."""
    files = weight_files(folder) or [folder / lora.WEIGHTS]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()[:12]


def is_shipped(model):
    """Whether it is the shipped one, for which our defaults were chosen."""
    return Path(model).resolve() == TINY.resolve()


def default_dtype(model, device):
    if device == "cpu" or is_shipped(model):
        return "float32"
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        tqdm.write(
            "this card has no bfloat16: --dtype is float32, and most models need LoRA to fit"
        )
        return "float32"
    return "bfloat16"


def find_folder(name):
    """A folder as it is; NAME[@REVISION] of the hub is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.jinja", "*.txt", "tokenizer*", "*.safetensors"]  # merges.txt
    name, _, revision = name.partition("@")
    with explained(f"model {name!r} is neither a folder nor to be had from the hub"):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))


def read_stop_ids(folder, tokenizer, config):
    """-> {id} of the tokens that end a completion: eos_token_id of tokenizer, config and generation
    config."""
    named = [tokenizer.eos_token_id, config.eos_token_id]
    path = folder / "generation_config.json"
    if path.is_file():
        with explained(f"{path}: not a JSON object"):
            named.append(json.loads(path.read_text()).get("eos_token_id"))
    lists = [ids if isinstance(ids, list) else [ids] for ids in named]
    stop_ids = {*chain(*lists)} - {None}
    for i in stop_ids:
        if i not in range(config.vocab_size):
            raise ValueError(
                f"{folder}: the stop token {i!r} is not in the model's vocabulary of "
                f"{config.vocab_size} (eos_token_id in config.json, generation_config.json or "
                "the tokenizer), so no completion would stop"
            )
    if not stop_ids:
        raise ValueError(f"{folder}: neither tokenizer nor config names a stop token")
    return stop_ids


PROBE = "So 12.5 + 340 = 352.5\n\n  gives $\\frac{705}{2}$ or \\boxed{352.5}"


def check_round_trip(folder, tokenizer):
    """Say in one line if tokens do not give a text back.

    Tokenizers may change a text on purpose (a blank in front, blanks joined, no letters at all in
    a toy), so this alone is no error. One that gives words back and no blank between them was read
    wrongly: the model would see, and the grader get, words that run together. Raises ValueError
    then.
    """
    back = ""
    with contextlib.suppress(Exception):  # a toy may know neither a character nor another for it
        back = tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False))
    words = f"{folder}: its tokenizer makes {back!r} of the text {PROBE!r}"
    if "gives" in back and " " not in back:
        raise ValueError(
            f"{words}: blanks are lost. Versions of transformers 5 read some of DeepSeek so: write "
            '"tokenizer_class": "PreTrainedTokenizerFast" into a copy of tokenizer_config.json'
        )
    if back != PROBE:
        tqdm.write(words)


def end_of_turn(tokenizer):
    """The token that the chat template puts behind an assistant's turn, blanks aside, if it was
    added to the tokenizer. A base model may name another end, and would run on into a question that
    it invents."""
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2 3"}]
    with explained("the chat template (or --template) fails"):
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("2 3")[2]
    tokens = tokenizer.encode(behind.strip(), add_special_tokens=False)
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None


def stop_token(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise ValueError(f"--stop {text!r}: is {len(tokens)} tokens of this tokenizer, not one")
    return tokens[0]
