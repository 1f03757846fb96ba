"""A linear layer of the frozen base under the adapters of many trials, forward and backward.

    y = bias + gain * (W x + up (down x'))        x' is x, or x after the adapter's dropout

Each token goes through its own slot's factors. `down` and `up` are lists of one or two pairs. The
first is the trained one, in the form in which it multiplies: A (or A - A0) and scale B'. The second
is the correction of the methods that start from a part of the base,

    scale (B A - B0 A0) = (scale B) (A - A0) + (scale (B - B0)) A0,

written as differences, because in 16 bits A - A0 keeps what A would round away. Dropout does not
fall on the correction, as in the published code, so that where any is dropped it is

    scale (B A x' - B0 A0 x) = (scale B) ((A - A0) x' + A0 (x' - x)) + (scale (B - B0)) A0 x.

`gain` is DoRA's m / |W + scale B A|, one for every other method and absent where no trial of a pack
needs it.

Layers that read the same input (query, key and value; gate and up) are one group: one product with
their weights side by side, one pass over the input for all of their adapters.

A base in nf4 stays packed: its weights are unpacked inside the operators, forward and backward, by
bitsandbytes' own code and in the precision of x, as its Linear4bit does. So neither autograd nor
the compiler sees an unpacked weight, and no more than one group's is there at a time.

The gradients of A, B and m do not travel through autograd: they are summed into float32 buffers
that outlive a step, since a batch may be spread over several. The compiler is not told that the
backward writes into them: told, it copies the whole buffer of all slots for each layer (seen with
torch 2.11: three quarters of the time). Nothing else in a step reads or writes them, and the
backward's result is always used, so that it runs exactly once. The input always requires a
gradient, or nothing would call it.

Legend: A slots, M tokens, D in, E out (all members of a group), R rank, K = members x R.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from loratune.engine.grouped import GroupedProducts, LoopedProducts, members
from loratune.engine.mixing import mixed
from loratune.engine.routing import Routing


@cache
def products_on(device_type: str) -> GroupedProducts:
    """The implementation of the low-rank products on a kind of device."""
    if device_type != "cuda":
        return LoopedProducts()
    from loratune.engine.kernels import TritonProducts  # Triton is there with CUDA alone.

    return TritonProducts()


@torch.library.custom_op("loratune::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    x_adapter: Tensor | None,
    weights: Sequence[Tensor],
    block_size: int | None,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    gain: Tensor | None,
    routing: Sequence[Tensor],
    segments: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_ME, and for the backward H_MK, the correction's H_MK and what the gain multiplied.

    The last is W x' + up (down x'), M x E. It is empty without a gain, and where it is y / gain.

    Args:
        x: M x D.
        x_adapter: what the adapters see, where it is not x.
        weights: one, E x D; with a `block_size` what `unpacked` takes.
        block_size: None where the weights are not packed.
        bias: E.
        downs: one or two of A x K x D.
        ups: one or two of A x R x E.
        gain: A x E, DoRA's m / norm.
        routing: the tensors of a `Routing`.
        segments: bounds of the members in E.
    """
    routes, products = Routing(*routing), products_on(x.device.type)
    seen = x if x_adapter is None else x_adapter
    hs = [x.new_empty(len(x), down.shape[1]) for down in downs]
    if x_adapter is None or len(downs) == 1:
        products.shrink(seen, downs, routes, into=hs)
    else:
        # The correction sees x itself: A x' - A0 x, and A0 x.
        products.shrink(x_adapter, downs[:1], routes, into=hs[:1])
        products.shrink(x, downs[1:], routes, into=hs[1:])
        dropped = torch.empty_like(hs[1])
        products.shrink(x_adapter - x, downs[1:], routes, into=[dropped])
        hs[0] += dropped
    weight = weights[0] if block_size is None else unpacked(weights, block_size, segments, like=x)
    y = x.new_empty(len(x), weight.shape[0])
    kept = _kept(y, bias, x_adapter, gain)
    if gain is None:
        products.expand(hs, ups, routes, into_MN=y, bias_N=bias, segments=segments)
        # One rounding of base and adapter together, and no pass over y for their sum.
        torch.addmm(y, x, weight.t(), out=y)
    else:
        torch.mm(seen, weight.t(), out=y)
        products.expand_rescaled(
            hs,
            ups,
            routes,
            onto_MN=y,
            gain_AN=gain,
            bias_N=bias,
            kept_MN=kept if kept.numel() else None,
            segments=segments,
        )
        if x_adapter is not None:
            # DoRA drops features for the part that it rescales, not for the base's own output.
            torch.addmm(y, x - x_adapter, weight.t(), out=y)
    # An operator may not return one tensor twice: each absent one is its own.
    return y, hs[0], hs[1] if len(hs) == 2 else x.new_empty(0), kept


@packed_linear.register_fake
def _(  # pyright: ignore[reportUnusedFunction]  # registered by its decorator
    x: Tensor,
    x_adapter: Tensor | None,
    weights: Sequence[Tensor],
    block_size: int | None,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    gain: Tensor | None,
    routing: Sequence[Tensor],
    segments: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape[0], segments[-1])
    hs = [x.new_empty(x.shape[0], down.shape[1]) for down in downs]
    correction = hs[1] if len(hs) == 2 else x.new_empty(0)
    return y, hs[0], correction, _kept(y, bias, x_adapter, gain)


def _kept(y: Tensor, bias: Tensor | None, x_adapter: Tensor | None, gain: Tensor | None) -> Tensor:
    """Room for what is rescaled, where y alone does not tell it; empty elsewhere."""
    told = gain is None or (bias is None and x_adapter is None)
    return y.new_empty(0) if told else torch.empty_like(y)


@torch.library.custom_op("loratune::packed_linear_backward", mutates_args=())
def packed_linear_backward(
    grads_y: Sequence[Tensor],
    x: Tensor,
    x_adapter: Tensor | None,
    h: Tensor,
    correction: Tensor,
    rescaled: Tensor,
    weights: Sequence[Tensor],
    block_size: int | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: Tensor,
    gain: Tensor | None,
    inverse_norm: Tensor | None,
    is_scaled: bool,
    grad_down: Tensor,
    grad_up: Tensor,
    grad_magnitude: Tensor | None,
    routing: Sequence[Tensor],
    segments: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """dL/dx and dL/dx' (empty where x' is x); adds the adapters' gradients to their buffers.

    Args, beyond those of `packed_linear` and what it returns:
        grads_y: M x each member's width.
        rescaled: what the gain multiplied, or y itself if `is_scaled`; empty without a gain.
        scale: A; multiplies the gradient of B.
        inverse_norm: A x E, DoRA's 1 / norm.
        grad_down, grad_up, grad_magnitude: float32 buffers like down, up and gain; written to.
    """
    routes, products = Routing(*routing), products_on(x.device.type)
    seen = x if x_adapter is None else x_adapter
    hs = [h] if correction.numel() == 0 else [h, correction]
    grad_hs = [torch.empty_like(one) for one in hs]
    grads = list(grads_y)
    if gain is not None:
        assert inverse_norm is not None
        assert grad_magnitude is not None
        through_gain = x.new_empty(len(x), segments[-1])
        products.rescale_gradient(
            grads,
            rescaled,
            routes,
            gain_AN=gain,
            inverse_norm_AN=inverse_norm,
            is_scaled=is_scaled,
            into_MN=through_gain,
            into_AN=grad_magnitude,
        )
        grads = list(through_gain.split([one.shape[1] for one in grads], dim=1))
    for grad, (ranks, outputs) in zip(grads, members(ups[0], segments), strict=True):
        products.shrink(
            grad,
            [up[:, :, outputs] for up in ups],
            routes,
            into=[one[:, ranks] for one in grad_hs],
        )
        products.outer(
            [one[:, ranks] for one in hs],
            grad,
            routes,
            into_AKN=grad_up[:, :, outputs],
            scale_A=scale,
        )
    products.outer(grad_hs[:1], seen, routes, into_AKN=grad_down)
    grad_seen = torch.empty_like(x)
    corrects_apart = x_adapter is not None and len(downs) == 2
    through = [grad_hs[0], grad_hs[0]] if corrects_apart else grad_hs
    products.expand(through, downs, routes, into_MN=grad_seen)
    weight = weights[0] if block_size is None else unpacked(weights, block_size, segments, like=x)
    if x_adapter is None or gain is not None:
        _add_through(grads, weight, segments, into=grad_seen)
        if x_adapter is None:
            return grad_seen, x.new_empty(0)
    # Through the base's own output, which has seen x and knows no gain.
    grad_x = torch.zeros_like(x)
    _add_through(grads_y, weight, segments, into=grad_x)
    if gain is not None:
        grad_seen -= grad_x
    if corrects_apart:
        through_correction = torch.empty_like(x)
        difference = grad_hs[1] - grad_hs[0]
        products.expand([difference], downs[1:], routes, into_MN=through_correction)
        grad_x += through_correction
    return grad_x, grad_seen


@packed_linear_backward.register_fake
def _(  # pyright: ignore[reportUnusedFunction]  # registered by its decorator
    grads_y: Sequence[Tensor],
    x: Tensor,
    x_adapter: Tensor | None,
    h: Tensor,
    correction: Tensor,
    rescaled: Tensor,
    weights: Sequence[Tensor],
    block_size: int | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: Tensor,
    gain: Tensor | None,
    inverse_norm: Tensor | None,
    is_scaled: bool,
    grad_down: Tensor,
    grad_up: Tensor,
    grad_magnitude: Tensor | None,
    routing: Sequence[Tensor],
    segments: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if x_adapter is None else torch.empty_like(x)


class _PackedLinears(torch.autograd.Function):
    """The two operators as one function with an output for each member.

    Not the operator's own autograd: its one output would be split, and the members' gradients laid
    side by side again by a pass over all of them.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, x_adapter: Tensor | None, group: "PackedGroup"
    ) -> tuple[Tensor, ...]:
        """The members' outputs, M x each one's width."""
        routing = group.step.routing
        y, h, correction, rescaled = packed_linear(
            x,
            x_adapter,
            group.weights,
            group.block_size,
            group.bias_E,
            group.downs,
            group.ups,
            group.gain_AE,
            routing,
            group.segments,
        )
        ctx.is_scaled = group.gain_AE is not None and rescaled.numel() == 0
        # Most members' outputs are kept by whoever reads them: y costs little or no more.
        ctx.save_for_backward(x, x_adapter, h, correction, y if ctx.is_scaled else rescaled)
        ctx.group, ctx.routing = group, routing
        widths = [high - low for low, high in pairwise(group.segments)]
        return y.split(widths, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Through x and x'; the group's gradients go to their buffers."""
        x, x_adapter, h, correction, rescaled = ctx.saved_tensors
        group = ctx.group
        if group.step.watcher is not None:
            group.step.watcher.add(
                group,
                x if x_adapter is None else x_adapter,
                h if correction.numel() == 0 else h.float() + correction,
                _before_gain(group, rescaled, ctx.routing) if ctx.is_scaled else rescaled,
                grads,
            )
        grad_x, grad_seen = packed_linear_backward(
            [grad.contiguous() for grad in grads],
            x,
            x_adapter,
            h,
            correction,
            rescaled,
            group.weights,
            group.block_size,
            group.downs,
            group.ups,
            group.scale_A,
            group.gain_AE,
            group.inverse_norm_AE,
            ctx.is_scaled,
            group.grad_down,
            group.grad_up,
            group.grad_magnitude,
            ctx.routing,
            group.segments,
        )
        return grad_x, None if x_adapter is None else grad_seen, None


def unpacked(
    packed: Sequence[Tensor], block_size: int, segments: Sequence[int], *, like: Tensor
) -> Tensor:
    """The members' weights side by side, E x D, in the precision of `like`, M x D.

    Args:
        packed: of each member its numbers, uint8, two nf4 codes each, and its scales, float32, one
            for each block of the weight's numbers row after row.
        block_size: numbers of a block.
        segments: bounds of the members in E.
        like: what the weights will be multiplied with.
    """
    # bitsandbytes registered its operators when the base was loaded with it.
    unpack = torch.ops.bitsandbytes.dequantize_4bit
    width, dtype = like.shape[1], like.dtype
    if len(segments) == 2:
        return unpack.default(*packed, block_size, "nf4", [segments[1], width], dtype)
    weight_ED = like.new_empty(segments[-1], width)
    for member, (low, high) in enumerate(pairwise(segments)):
        numbers, scales = packed[2 * member : 2 * member + 2]
        given = (numbers, scales, block_size, "nf4", [high - low, width], dtype)
        if like.is_cuda:  # No copy.
            unpack.out(*given, out=weight_ED[low:high])
        else:  # Its code for CPUs writes into memory of its own alone.
            weight_ED[low:high] = unpack.default(*given)
    return weight_ED


def _before_gain(group: "PackedGroup", y_ME: Tensor, routing: Sequence[Tensor]) -> Tensor:
    """What DoRA's gain multiplied, from what it made of it."""
    assert group.gain_AE is not None
    return y_ME / of_tokens(group.gain_AE, Routing(*routing))


def of_tokens(gain_AE: Tensor, routing: Routing) -> Tensor:
    """Each token's own slot's gain; one for filler."""
    slots_M = routing.token_slot_M.long()
    picked = gain_AE.index_select(0, slots_M.clamp(min=0))
    return torch.where((slots_M >= 0)[:, None], picked, 1)


def _add_through(
    grads: Sequence[Tensor], weight_ED: Tensor, segments: Sequence[int], *, into: Tensor
) -> None:
    """Add dY W: one product where the members' gradients lie side by side, else one a member."""
    joined = _joined(grads)
    if joined is not None:
        torch.addmm(into, joined, weight_ED, out=into)
        return
    for grad, (low, high) in zip(grads, pairwise(segments), strict=True):
        torch.addmm(into, grad, weight_ED[low:high], out=into)


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrix whose columns the parts are, in order; None if they are not of one."""
    first = parts[0]
    at, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        if (
            part.untyped_storage().data_ptr() != storage
            or part.storage_offset() != at
            or part.stride() != first.stride()
        ):
            return None
        at += part.shape[1]
    width = at - first.storage_offset()
    if len(parts) > 1 and (width > first.stride(0) or first.stride(1) != 1):
        return None
    return first.as_strided((first.shape[0], width), first.stride())


@final
class PackedGroup(nn.Module):
    """Linear layers that read one input, under one set of slots. Called by its first member.

    `weights` is one, the members' side by side, E x D; with a `block_size` it is what `unpacked`
    takes. All tensors are views of the pack's; `index` is the group's place in its layout.
    """

    def __init__(
        self,
        *,
        index: int,
        weights: Sequence[Tensor],
        block_size: int | None,
        bias_E: Tensor | None,
        segments: Sequence[int],
        downs: Sequence[Tensor],
        ups: Sequence[Tensor],
        scale_A: Tensor,
        grad_down: Tensor,
        grad_up: Tensor,
        gain_AE: Tensor | None,
        inverse_norm_AE: Tensor | None,
        grad_magnitude: Tensor | None,
        step: "StepRouting",
        dropout: "Dropout | None",
    ) -> None:
        super().__init__()
        self.index = index
        self.weights, self.block_size = list(weights), block_size
        self.bias_E = bias_E
        self.segments = list(segments)
        self.downs, self.ups = list(downs), list(ups)
        self.scale_A = scale_A
        self.grad_down, self.grad_up = grad_down, grad_up
        self.gain_AE, self.inverse_norm_AE = gain_AE, inverse_norm_AE
        self.grad_magnitude = grad_magnitude
        self.step = step
        self.dropout = dropout
        self.pending: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The members' outputs, each 1 x M x its width."""
        x_MD = x.view(-1, x.shape[-1])
        # Features are dropped while training, which is when gradients are wanted.
        drops = torch.is_grad_enabled()
        x_adapter = self.dropout(x_MD, self.step) if drops and self.dropout is not None else None
        ys = _PackedLinears.apply(x_MD, x_adapter, self)
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)


class LinearGroup(Protocol):
    """Linear layers that read one input: called by the first of them, for all."""

    pending: tuple[Tensor, ...] | None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The members' outputs."""
        ...


@final
class PackedLinear(nn.Linear):
    """Stands in a base model where one member of a group stood, with that one's weight.

    Members are called in their order and with one and the same input, as every decoder's attention
    and gated MLP do; the engine checks its logits against the base's own before it trains.
    """

    def __init__(
        self, linear: nn.Linear, group: LinearGroup, *, member: int, num_members: int
    ) -> None:
        # Not nn.Linear's own, which would draw a weight: this one has its predecessor's.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # A list hides the group from named_modules: it stands in the model once a member.
        self._group = [group]
        self._member = member
        self._is_last = member + 1 == num_members

    def forward(self, input: Tensor) -> Tensor:
        """1 x M x D to 1 x M x E."""
        group = self._group[0]
        if self._member == 0:
            group.pending = group(input)
        assert group.pending is not None
        y = group.pending[self._member]
        if self._is_last:
            group.pending = None
        return y


class BackwardWatcher(Protocol):
    """Reads what a group's backward is made of, and changes nothing."""

    def add(
        self,
        group: PackedGroup,
        seen_MD: Tensor,
        h_MK: Tensor,
        before_ME: Tensor,
        grads_ME: Sequence[Tensor],
    ) -> None:
        """What the adapters saw, A x with the correction's part, DoRA's output before its gain
        (empty where there is none), and dL/dy of every member."""
        ...


class StepRouting:
    """What all packed layers of a model ask about the step under way; written by the engine.

    `routing` are the tensors of a `Routing`. `token_key_M` (int32) is a number of each token's own
    (trial's seed, row, position), `keep_A` the share of features that a slot's dropout keeps.
    `watcher` is shown every group's backward of a step that is looked at row by row.
    """

    def __init__(self) -> None:
        self.watcher: BackwardWatcher | None = None
        self.routing: list[Tensor] = []
        self.token_key_M: Tensor | None = None
        self.keep_A: Tensor | None = None


@final
class Dropout(nn.Module):
    """Dropout whose mask is a pure function of trial, row, position, layer and feature.

    So a trial drops the same numbers whoever its neighbours are, wherever its batch is cut, and
    after a resume.
    """

    def __init__(self, *, salt: int, device: torch.device) -> None:
        super().__init__()
        # Far apart, or a layer's mask would be its neighbour's, one feature further: multiples of
        # 2^32 over the golden ratio keep the features of thousands of layers from meeting.
        first = (salt * 0x9E3779B1 + 2**31) % 2**32 - 2**31
        # A tensor, or the compiler would compile each layer anew for its number.
        self._first = torch.tensor(first, dtype=torch.int32, device=device)

    def forward(self, x_MD: Tensor, step: StepRouting) -> Tensor:
        """x with each feature zeroed with its slot's probability, the others scaled up."""
        assert step.token_key_M is not None
        assert step.keep_A is not None
        features_D = torch.arange(x_MD.shape[1], dtype=torch.int32, device=x_MD.device)
        bits_MD = mixed(step.token_key_M[:, None] ^ mixed(features_D + self._first)[None, :])
        uniform_MD = (bits_MD & 0x7FFFFF).to(torch.float32) / 0x800000
        slots_M = step.routing[-1].long()
        keep_M = torch.where(slots_M >= 0, step.keep_A[slots_M.clamp(min=0)], 1.0)
        scaled_MD = (x_MD / keep_M[:, None]).to(x_MD.dtype)
        return torch.where(uniform_MD < keep_M[:, None], scaled_MD, 0)
