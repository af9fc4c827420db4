"""AdamW on the weights of a policy: float32 masters, shards over processes, the learning rate."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01  # verl's defaults, which DeepScaleR and FastCuRL use
SMALL = 4_000_000  # parameters, see Learner.takes_two_threads


def learning_rate(cfg, trained, progress):
    """--lr, times a linear warm-up, times a decay from 1 at a level's start to 0 at its end.

    trained   updates of the level that changed the policy so far
    progress  share of the level's budget that is used up, in [0, 1)
    """
    rate = cfg.lr * min(1.0, (trained + 1) / max(cfg.warmup, 1))
    if cfg.lr_decay == "none":
        return rate
    if cfg.lr_decay == "linear":
        return rate * (1 - progress)
    return rate * (1 + math.cos(math.pi * progress)) / 2


class Learner:
    """The optimizer of one policy: of those of its weights that are not frozen.

    Weights of less than float32 have float32 masters, which own gradients and moments: an update
    of 1e-6 of a weight would vanish in bfloat16.

    model  what the gradient goes through: the policy's own model, or under FSDP a sharded copy
           whose shards are the masters. The policy's own weights stay whole on every process:
           sampling from shards would gather them for every token.
    """

    def __init__(self, policy_model, ranks, recompute=False):
        self.ranks = ranks
        named = policy_model.named_parameters()
        self.names, self.weights = zip(*[(n, p) for n, p in named if p.requires_grad])
        self.model = shard(policy_model, ranks) if ranks.sharded else policy_model
        self.model.model.recompute = recompute
        self.masters = [p for p in self.model.parameters() if p.requires_grad]
        self.has_copies = not ranks.sharded and self.weights[0].dtype.itemsize < 4
        if self.has_copies:
            self.masters = [weight.detach().float() for weight in self.weights]
            for weight, master in zip(self.weights, self.masters):
                master.grad = torch.zeros_like(master)
                weight.register_post_accumulate_grad_hook(partial(move_gradient, master))
        self.models = [self.model]
        if self.takes_two_threads():
            twin = copy.deepcopy(self.model)  # which takes gradients of its own
            for weight, own in zip(twin.parameters(), self.model.parameters()):
                weight.data = own.data
            self.models.append(twin)
            threads = torch.get_num_threads() // 2
            self.pool = ThreadPoolExecutor(2, "learn", torch.set_num_threads, (threads,))
        self.adamw = torch.optim.AdamW(
            self.masters, lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def takes_two_threads(self):
        """Whether two threads compute gradients side by side. On a CPU the operations of a small
        model are too short to be cut over its cores. A large one would need more memory: with LoRA,
        too, where the copy has the frozen weights."""
        size = sum(weight.numel() for weight in self.model.parameters())
        on_cpu = self.weights[0].device.type == "cpu" and torch.get_num_threads() > 1
        return on_cpu and size < SMALL and not self.ranks.sharded and not self.has_copies

    def add_gradients(self, backward, shares):
        """backward(model, share) -> [...] leaves a gradient; a model and a thread for each share.
        -> the results of all.  Gradients are summed in the order of shares, so that every run has
        the same bits."""
        if len(shares) == 1:
            return backward(self.model, *shares)
        found = list(self.pool.map(backward, self.models, shares))
        for ours, theirs in zip(*(model.parameters() for model in self.models)):
            grads = [p.grad for p in (ours, theirs) if p.grad is not None]
            ours.grad, theirs.grad = sum(grads) if grads else None, None
        return sum(found, [])

    def step(self, lr, max_norm):
        """One step at learning rate lr; returns the gradient's norm before it was clipped.

        A gradient that is not finite, or exactly 0 (flat groups alone), moves nothing: neither by
        Adam's momentum nor by weight decay.
        """
        self.ranks.sum_gradients(self.masters)
        norm = gather(torch.nn.utils.clip_grad_norm_(self.masters, max_norm)).item()
        if norm and math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
            self.publish()
        self.drop_gradient()
        return norm

    def drop_gradient(self):
        self.adamw.zero_grad(set_to_none=not self.has_copies)

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


def move_gradient(master, weight):
    """A hook of the backward pass."""
    master.grad += weight.grad
    weight.grad = None


# ----------------------------------------------------------------------------------------- shards


def shard(model, ranks):
    """A copy of the model that FSDP2 cuts over the processes: float32 (or wider) weights, which are
    the masters, computing in the model's own dtype."""
    from torch.distributed import device_mesh, fsdp

    dtype = model.lm_head.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    sharded = copy.deepcopy(model).to(wide)
    mesh = device_mesh.init_device_mesh(ranks.device.type, (ranks.size,))
    precision = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide)
    for part in (*sharded.model.layers, sharded):
        fsdp.fully_shard(part, mesh=mesh, mp_policy=precision)
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
