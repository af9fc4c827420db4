"""AdamW on the weights of a policy: sums of gradients, float32 masters, shards over processes."""

import copy
import math
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from tqdm import tqdm

BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01  # verl's defaults, which DeepScaleR and FastCuRL use
MAX_GRAD_NORM = 1.0  # the gradient's norm is clipped to this (DAPO)
# Padded tokens of a micro-batch, by device; memory and speed only. One completion may be longer.
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
LEAST_MICRO_BATCH = 256  # tokens, of one that was halved


class Learner:
    """The optimizer of one policy: of those of its weights that are not frozen.

    Weights of less than float32 have float32 masters, which own gradients and moments: an update
    of 1e-6 of a weight would vanish in bfloat16.

    model    what gradients go through
    weights  those of the policy's model that are learned (with LoRA its factors). Every process has
             them whole: sampling from shards would gather them for every token.
    masters  what AdamW steps on; `publish` copies them to the weights if they are not the same

    case                model            weights    masters
    float32, float64    the policy's     as given   the weights themselves
    bfloat16            the policy's     bfloat16   float32 copies; a hook moves each gradient there
    FSDP                a sharded copy   as given   the shards of the copy, float32 or wider
    """

    def __init__(self, policy_model, ranks):
        self.ranks = ranks
        named = policy_model.named_parameters()
        self.names, self.weights = zip(*[(n, p) for n, p in named if p.requires_grad])
        self.model = shard(policy_model, ranks) if ranks.sharded else policy_model
        self.masters = [p for p in self.model.parameters() if p.requires_grad]
        if self.weights[0].itemsize < 4 and not ranks.sharded:
            self.masters = [weight.detach().float() for weight in self.weights]
            for weight, master in zip(self.weights, self.masters):
                weight.register_post_accumulate_grad_hook(partial(move_gradient, master))
        device = self.weights[0].device.type
        # Memory and speed only. Without FSDP a GPU begins to recompute when it is full.
        self.model.model.recompute = device == "cuda" and ranks.sharded
        self.most_tokens = MICRO_BATCH_TOKENS[device]
        self.num_steps = 0  # so far
        self.adamw = torch.optim.AdamW(  # `step` sets the rate
            self.masters, lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def micro_batches(self, samples):
        """Yields this process's share of the samples of a step, samples of one prompt at a time,
        and the weight with which their loss counts.

        FSDP averages gradients over the processes, and we need their sum. It gathers weights from
        all of them, so one that has fewer micro-batches gets others, of weight 0.
        """
        size, sharded = self.ranks.size, self.ranks.sharded
        shares = [cut_micro_batches(s, self.most_tokens) for s in split(samples, size)]
        own = shares[self.ranks.rank]
        for micro in own:
            yield micro, size if sharded else 1
        for _ in range(max(map(len, shares)) - len(own) if sharded else 0):
            yield [min(samples, key=completion_length)], 0

    def use_less_memory(self, error):
        """A GPU is full: drop what a step has of its gradient, and compute layers again in the
        backward pass; if that is done already, halve the micro-batches.

        Raises `error`, its OutOfMemoryError, if they are the smallest, and under FSDP, where all
        processes would have to begin anew together.
        """
        if self.ranks.sharded or self.most_tokens <= LEAST_MICRO_BATCH:
            raise error
        self.drop_gradient()
        body = self.model.model
        if not body.recompute:
            body.recompute, change = True, "layers are computed again in the backward pass"
        else:
            self.most_tokens //= 2
            change = f"micro-batches of {self.most_tokens} tokens"
        tqdm.write(f"out of memory: {change} from now on")

    def step(self, lr):
        """One step at learning rate lr, by the sum of the gradients of all processes; returns its
        norm before it was clipped.

        A gradient that is not finite, or exactly 0 (flat groups alone), moves nothing: neither by
        Adam's momentum nor by weight decay.
        """
        if self.ranks.size > 1 and not self.ranks.sharded:  # FSDP's backward pass has done it
            for p in self.masters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        norm = gather(torch.nn.utils.clip_grad_norm_(self.masters, MAX_GRAD_NORM)).item()
        if norm and math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
            self.num_steps += 1
            self.publish()
        self.drop_gradient()
        return norm

    def drop_gradient(self):
        """Its memory is free while completions are sampled."""
        for p in {*self.masters, *self.weights}:  # where memory ran out, weights may have theirs
            p.grad = None

    @torch.no_grad()
    def publish(self):
        """Give the policy the weights of the masters."""
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                weight.copy_(gather(master))

    def tensors(self):
        """(name, whole tensor) of all that the optimizer holds. Every process must iterate: shards
        are gathered from all."""
        for name, weight, master in zip(self.names, self.weights, self.masters):
            if weight.dtype != master.dtype:
                yield f"master.{name}", gather(master.detach())
            for kind, value in self.adamw.state.get(master, {}).items():
                yield f"{kind}.{name}", gather(value)

    @torch.no_grad()
    def load(self, tensors):
        """The inverse of `tensors`, whatever number of processes wrote them."""
        masters = dict(zip(self.names, self.masters))
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            master = masters[name]
            value = cut_like(master, tensor)
            if kind == "master":
                master.copy_(value)
            else:
                self.adamw.state[master][kind] = value


def completion_length(sample):
    return len(sample.completion.tokens)


def split(samples, num_parts):
    """Contiguous parts of about equal numbers of tokens, so that most groups stay together."""
    parts, before = [[] for _ in range(num_parts)], 0
    num_tokens = sum(map(completion_length, samples))
    for s in samples:
        parts[before * num_parts // num_tokens].append(s)
        before += completion_length(s)
    return parts


def cut_micro_batches(samples, max_tokens):
    """Samples -> micro-batches: of one prompt each, and of at most max_tokens padded tokens (or of
    one sample)."""
    batches = []
    ordered = sorted(samples, key=lambda s: (s.group.prompt, -completion_length(s)))
    for prompt, alike in groupby(ordered, lambda s: s.group.prompt):
        waiting = list(alike)
        while waiting:  # the first one is the longest, to which the others are padded
            size = max(1, (max_tokens - len(prompt)) // completion_length(waiting[0]))
            batches.append(waiting[:size])
            del waiting[:size]
    return batches


def move_gradient(master, weight):
    """A hook of the backward pass: in float32, where the sum over micro-batches loses nothing."""
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad += weight.grad
    weight.grad = None


# ----------------------------------------------------------------------------------------- shards


def shard(model, ranks):
    """A copy of the model that FSDP2 cuts over the processes: float32 (or wider) weights, which are
    the masters, computing in the model's own dtype."""
    from torch.distributed import device_mesh, fsdp

    dtype = model.lm_head.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    layers = model.model.layers
    # A copy without layers: deepcopy takes the empty list for a copy that it has made already.
    sharded = copy.deepcopy(model, {id(layers): torch.nn.ModuleList()}).to(wide)
    mesh = device_mesh.init_device_mesh(ranks.device.type, (ranks.size,))
    precision = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide)
    for layer in layers:  # one by one: no process ever holds all of them in float32
        part = copy.deepcopy(layer).to(wide)
        fsdp.fully_shard(part, mesh=mesh, mp_policy=precision)
        sharded.model.layers.append(part)
    fsdp.fully_shard(sharded, mesh=mesh, mp_policy=precision)
    fsdp.register_fsdp_forward_method(sharded, "token_logprobs")
    return sharded


def gather(tensor):
    """The whole tensor of a shard, from all processes; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cut_like(master, tensor):
    """A whole tensor laid out as the master is: on its device, or cut into its shards. A single
    number is never cut."""
    tensor = tensor.to(master.device)
    if not (tensor.dim() and hasattr(master, "full_tensor")):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, master.device_mesh, master.placements)
