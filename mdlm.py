"""A masked diffusion language model (MDLM) in one file: the toy, LLaDA, Dream and their relatives.

The model is a bidirectional transformer (RMSNorm, SwiGLU, rotary positions; by configuration
grouped-query attention, q/k/v biases, norms of q and k) that predicts all masked tokens of a
sequence at once. `MDLM` is a `tie.Denoiser`: it computes logits at chosen positions only, and
`logits[b, k]` is the distribution of the token AT `positions[b, k]`. `Cached` is the same with a
cache of keys and values. `load` reads the folder of a model, `load_codec` its tokenizer.
`FAMILIES` says what each family's folders look like.

Shapes: B sequences, L positions, N recomputed positions, K chosen positions, V vocabulary, D width,
H heads, G key/value heads, E components per head.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InSequence
from torch import Tensor, nn

# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Shape and details of one model. The fields from `qkv_bias` on tell the families apart.

    Raises ValueError for sizes that don't fit together and ids outside the vocabulary.
    """

    vocab_size: int
    width: int  # D
    layers: int
    heads: int  # H
    kv_heads: int  # G, divides H
    hidden: int  # inner width of the SwiGLU
    max_length: int
    mask_id: int
    eos_id: int | tuple[int, ...]
    pad_id: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    rope_float32: bool = True  # rotate in float32 (LLaDA) or in the model's dtype (Dream)
    shift: bool = False  # the output at i - 1 is the distribution of token i (Dream)
    qk_norm: bool = False  # RMSNorm per head on q and k, before the rotation (Qwen3)
    head_dim: int | None = None  # E, if it isn't width / heads

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "hidden", "max_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.head_dim is None and self.width % (2 * self.heads):  # rotations take pairs
            raise ValueError(
                f"width must be a multiple of 2 * {self.heads} heads, got {self.width}"
            )
        for i in (self.mask_id, self.pad_id, *self.eos_ids):
            if type(i) is not int or not 0 <= i < self.vocab_size:
                below = f"must be below the vocab_size of {self.vocab_size}"
                raise ValueError(f"mask_id, pad_id and eos_id {below}, got {i!r}")
        if self.mask_id in (self.pad_id, *self.eos_ids):
            raise ValueError(f"mask_id must not be pad_id or an eos_id, got {self.mask_id}")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)

    @property
    def E(self) -> int:
        return self.head_dim or self.width // self.heads


class RMSNorm(nn.Module):
    """Normalises in float32, casts back to the model's dtype, then scales, as all families do."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotary(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (B, L, E) for positions (B, L), with the first half of sin negated as `rotate`
    expects. Computed in float32, returned in `dtype`."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim  # (E/2,)
    angles = positions[:, :, None].float() * (1.0 / theta**exponents)  # (B, L, E/2)
    sin = angles.sin()
    return angles.cos().repeat(1, 1, 2).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate component i of x (B, heads, L, E) with component i + E/2, by the cos and sin (B, L, E)
    of `rotary` and in their dtype. Returns the dtype of x."""
    y = x.to(cos.dtype)  # kept to few operations: small batches are launch-bound on a GPU
    return (y * cos[:, None] + y.roll(y.shape[-1] // 2, -1) * sin[:, None]).to(x.dtype)


Layout = tuple[Tensor, Tensor, Tensor | None]
"""cos and sin (B or 1, L, E) of the positions, and the attention mask of the keys (B, 1, 1, L)."""
Slot = tuple[Tensor, Tensor, Tensor]
"""Cached keys and values (B, G, L, E) of a layer, and the positions (B, N) to write to."""


class Block(nn.Module):
    """Pre-norm attention over all positions (no causal mask), then a pre-norm SwiGLU."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.heads
        self.kv_heads = c.kv_heads
        self.attn_norm = RMSNorm(c.width, c.norm_eps)
        self.q = nn.Linear(c.width, c.heads * c.E, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.kv_heads * c.E, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.kv_heads * c.E, bias=c.qkv_bias)
        self.o = nn.Linear(c.heads * c.E, c.width, bias=False)
        self.q_norm = RMSNorm(c.E, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.E, c.norm_eps) if c.qk_norm else nn.Identity()
        self.mlp_norm = RMSNorm(c.width, c.norm_eps)
        self.gate = nn.Linear(c.width, c.hidden, bias=False)
        self.up = nn.Linear(c.width, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.width, bias=False)

    def forward(
        self, x: Tensor, layout: Layout, chosen: Tensor | None, slot: Slot | None
    ) -> Tensor:
        """x (B, N, D) -> (B, N, D), or (B, K, D) at the indices `chosen` (B, K) only.

        With a `slot`, the N computed keys and values are written to the cache, and all L are
        attended to.
        """
        cos, sin, attn_mask = layout
        y = self.attn_norm(x)
        k = rearrange(self.k(y), "b n (g e) -> b g n e", g=self.kv_heads)
        k = rotate(self.k_norm(k), cos, sin)
        v = rearrange(self.v(y), "b n (g e) -> b g n e", g=self.kv_heads)
        if slot is not None:
            keys, values, written = slot
            index = written[:, None, :, None].expand_as(k)  # (B, G, N, E)
            k = keys.scatter_(2, index, k)  # (B, G, L, E)
            v = values.scatter_(2, index, v)
        if self.kv_heads < self.heads:
            k = repeat(k, "b g l e -> b (g r) l e", r=self.heads // self.kv_heads)
            v = repeat(v, "b g l e -> b (g r) l e", r=self.heads // self.kv_heads)
        if chosen is not None:
            at = chosen[:, :, None]
            x, y, cos, sin = (z.take_along_dim(at, 1) for z in (x, y, cos, sin))  # (B, K, D or E)
        q = rearrange(self.q(y), "b k (h e) -> b h k e", h=self.heads)
        q = rotate(self.q_norm(q), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)  # (B, H, K, E)
        x = x + self.o(rearrange(y, "b h k e -> b k (h e)"))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class MDLM(nn.Module):
    """The denoiser p(x_0 | x_t) of a masked diffusion language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.width)
        # `load` builds the model on the meta device, where normal_ spends a second on imports.
        if not weight.is_meta:
            weight.normal_()
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K, V) of the tokens at `positions` (B, K), or (B, L, V) at all positions.

        tokens (B, L) int64; attention_mask (B, L) bool, False on padding. Padding is never attended
        to, and logits there mean nothing. Raises ValueError if L exceeds the config's max_length.
        """
        if positions is None and self.config.shift:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        chosen = None if positions is None else self.outputs_of(positions, attention_mask)
        return self.logits(tokens, self.layout(tokens, attention_mask), chosen)

    def layout(self, tokens: Tensor, attention_mask: Tensor | None) -> Layout:
        """What all layers need to know about the positions of tokens (B, L)."""
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise ValueError(
                f"the model takes up to {c.max_length} positions, got {tokens.shape[1]}"
            )
        # Padding doesn't count as a position. LLaDA's own code counts it, which only shifts a whole
        # row by a constant, and rotary attention depends on differences of positions.
        real = torch.ones_like(tokens[:1]) if attention_mask is None else attention_mask.long()
        dtype = torch.float32 if c.rope_float32 else self.embed.weight.dtype
        cos, sin = rotary(real.cumsum(1) - 1, c.E, c.rope_theta, dtype)
        # Dream's own code also hides real keys from padding, which changes no real position.
        return cos, sin, None if attention_mask is None else attention_mask[:, None, None, :]

    def outputs_of(self, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The positions (B, K) whose outputs predict the tokens at `positions` (B, K): the same
        ones, or with `shift` the ones before, except for the first real position of a row."""
        if not self.config.shift:
            return positions
        before = (positions - 1).clamp(min=0)
        if attention_mask is None:
            return before
        return torch.where(attention_mask.gather(1, before), before, positions)

    def logits(
        self, tokens: Tensor, layout: Layout, chosen: Tensor | None, slots: Sequence[Slot] = ()
    ) -> Tensor:
        """Logits (B, K, V) at the indices `chosen` (B, K) of tokens (B, N); see `Block.forward`."""
        x = self.embed(tokens)  # (B, N, D)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            # The last layer only needs the chosen positions; this saves 1/6 of the toy's forward
            # and 1/36 of LLaDA's.
            x = layer(x, layout, chosen if i == last else None, slots[i] if slots else None)
        return self.head(self.norm(x))


class Cached:
    """An approximate `tie.Denoiser`: an `MDLM` that keeps keys and values from call to call.

    A call recomputes the positions that are asked for and those whose token has changed since the
    last call. It attends to the kept keys and values of all others. Every `refresh`-th call
    recomputes everything, as does the first call with a new batch or layout; with refresh = 1 this
    is the exact model. Refreshing at the start of each block makes plain decoding Fast-dLLM's dual
    cache (arXiv:2505.22618). With refresh = n, the ensemble interval, all members refresh in the
    first step of a round, where no change counts in a score.

    A new batch is recognised by a change of a token that wasn't masked at first, or by the tokens
    of the batch's first call. Create a new `Cached` if you decode the same prompts from other
    starting points, or if the weights change. With logit scores, one cache reads the states of all
    members one after another. A row without further relays can then be refreshed at other steps
    than it would be alone.

    `computed` (B,) int64 says how many positions of each row, without padding, the last call had to
    recompute. In a batch, every row recomputes as many as the row that needs the most.

    Raises ValueError if `model` is not an MDLM or `refresh` not a whole number of at least 1.
    """

    def __init__(self, model: MDLM, refresh: int):
        if not isinstance(model, MDLM):
            raise ValueError(f"model must be an MDLM, got {type(model).__name__}")  # noqa: TRY004
        if type(refresh) is not int or refresh < 1:
            raise ValueError(f"refresh must be a whole number of at least 1, got {refresh!r}")
        self.model = model
        self.refresh = refresh
        self.calls = 0
        self.computed = torch.empty(0, dtype=torch.long)  # (B,), see above
        self.kept: list[tuple[Tensor, Tensor]] = []  # keys and values (B, G, L, E) of each layer
        # (B, L): tokens and attention mask of the last call. The batch's first tokens, and which of
        # these aren't masks.
        self.tokens = self.real = self.first = self.fixed = torch.empty(0, 0)

    # The cache can't hold inference tensors: a later call may write to it outside inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K, V), as `MDLM.forward` returns them."""
        cos, sin, attn_mask = self.model.layout(tokens, attention_mask)
        outputs = self.model.outputs_of(positions, attention_mask)  # (B, K)
        real = torch.ones_like(tokens, dtype=torch.bool)
        real = real if attention_mask is None else attention_mask
        needed, count = self._needed(tokens, torch.cat([positions, outputs], dim=1), real)
        # (B, N) the needed positions of each row; a row with fewer than N repeats its first one.
        at = needed.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        at = torch.where(needed.gather(1, at), at, at[:, :1])
        cos, sin = (z.take_along_dim(at[:, :, None], 1) for z in (cos, sin))  # (B, N, E)
        chosen = needed.cumsum(1).gather(1, outputs) - 1  # (B, K), indices into the N positions
        slots = [(keys, values, at) for keys, values in self.kept]
        logits = self.model.logits(tokens.gather(1, at), (cos, sin, attn_mask), chosen, slots)
        self.computed = (needed & real).sum(1)
        self.tokens = tokens.clone()
        self.real = real.clone()
        self.calls += 1
        return logits

    def _needed(self, tokens: Tensor, asked: Tensor, real: Tensor) -> tuple[Tensor, int]:
        """(B, L) bool, the positions to recompute, and the largest number of them in a row."""
        needed = torch.zeros_like(real).scatter(1, asked, True)
        count = 0
        new_batch = True
        if (tokens.shape, tokens.device) == (self.tokens.shape, self.tokens.device):
            changed = tokens != self.tokens
            needed |= changed
            other = (changed & self.fixed).any() | (real != self.real).any()
            other |= (tokens == self.first).all()
            # The only wait for the device in a step: the result is the size of the computation.
            count, new_batch = torch.stack([needed.sum(1).amax(), other.long()]).tolist()
        if new_batch:
            self._start(tokens)
        if self.calls % self.refresh == 0:
            return torch.ones_like(real), tokens.shape[1]
        return needed, count

    def _start(self, tokens: Tensor) -> None:
        """Begin a batch with an empty cache."""
        c = self.model.config
        shape = (len(tokens), c.kv_heads, tokens.shape[1], c.E)
        zeros = self.model.embed.weight.new_zeros
        self.kept = []  # frees the memory of the last batch before allocating that of this one
        self.kept = [(zeros(shape), zeros(shape)) for _ in self.model.layers]
        self.calls = 0
        self.first = tokens.clone()
        self.fixed = tokens != c.mask_id


# --- the paper's training loss --------------------------------------------------------------------


def diffusion_loss(
    model: MDLM, tokens: Tensor, editable: Tensor, generator: torch.Generator
) -> Tensor:
    """Negative ELBO of Eq. 4 with the linear schedule: nats per sequence, mean over the batch.

    tokens (B, L) int64; editable (B, L) bool, the positions that may be masked (not those of the
    prompt and the suffix). At time t each editable token is masked with probability t, and a masked
    token costs its cross-entropy / t. The times of a batch are spread evenly over (0, 1] from one
    random offset (low-discrepancy sampling). train_toy.py uses another loss.
    """
    B = tokens.shape[0]
    offset = torch.rand(1, generator=generator, device=tokens.device)
    t = 1 - (offset + torch.arange(B, device=tokens.device) / B) % 1  # (B,)
    # Below 1e-3, single draws with their 1 / t would dominate a batch. The bias is of order 1e-6.
    t = t.clamp(min=1e-3)[:, None]  # (B, 1)
    drawn = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    masked = editable & (drawn < t)  # (B, L)
    logits = model(tokens.masked_fill(masked, model.config.mask_id))  # (B, L, V)
    cost = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none")  # (B, L)
    return (cost * masked / t).sum() / B


# --- families -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How the folders of one family map to MDLM and to TextCodec."""

    keys: dict[str, str]  # field of ModelConfig -> key in config.json, if its name differs
    overrides: dict[str, bool]  # fields of ModelConfig that the family fixes
    required: dict[str, tuple]  # key in config.json -> values that MDLM supports; None: absent
    names: dict[str, str]  # part of a tensor's name here -> in the files, if it differs
    # What the codec uses if the folder doesn't say it itself.
    mask: str = ""  # the mask token
    end: str = ""  # a token that ends an answer
    template: str = ""  # the chat template, in Jinja, which drops one newline at its end


_OFF = (None, False)
_KEYS = {
    "mask_id": "mask_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
_LLAMA_KEYS = _KEYS | {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "hidden": "intermediate_size",
    "max_length": "max_position_embeddings",
}  # fmt: skip
_LLAMA_REQUIRED = {
    "hidden_act": ("silu",), "use_sliding_window": _OFF, "layer_norm_eps": (None,),
    "quantization_config": (None,),
}  # fmt: skip
_LLAMA_NAMES = {
    "embed": "model.embed_tokens", "layers": "model.layers", "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj", "norm": "model.norm", "head": "lm_head",
}  # fmt: skip
_QWEN_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n\n"
)
_LLAMA_TEMPLATE = (
    "<|start_header_id|>user<|end_header_id|>\n\n{{ messages[0].content | trim }}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n\n"
)


def _llama_like(mask: str, end: str = "", template: str = "", **overrides: bool) -> Family:
    """A family with Llama's layout, as Hugging Face's code writes it."""
    overrides["rope_float32"] = False
    return Family(_LLAMA_KEYS, overrides, _LLAMA_REQUIRED, _LLAMA_NAMES, mask, end, template)


FAMILIES = {
    "mdlm": Family({}, {}, {}, {}),
    "llada": Family(
        keys=_KEYS | {
            "width": "d_model", "layers": "n_layers", "heads": "n_heads", "kv_heads": "n_kv_heads",
            "hidden": "mlp_hidden_size", "max_length": "max_sequence_length",
            "rope_float32": "rope_full_precision",
        },
        overrides={},
        required={
            "block_type": ("llama",), "activation_type": ("silu",), "include_bias": (False,),
            "include_qkv_bias": (False,), "rope": (True,), "alibi": _OFF, "clip_qkv": (None,),
            "layer_norm_type": ("rms",), "bias_for_layer_norm": _OFF, "input_emb_norm": _OFF,
            "attention_layer_norm": _OFF, "weight_tying": (False,), "scale_logits": _OFF,
            "block_group_size": (None, 1), "quantization_config": (None,),
        },
        names={
            "embed": "model.transformer.wte", "layers": "model.transformer.blocks",
            "attn_norm": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj",
            "o": "attn_out", "mlp_norm": "ff_norm", "gate": "ff_proj", "up": "up_proj",
            "down": "ff_out", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
        },
        mask="<|mdm_mask|>", end="<|eot_id|>", template="<|startoftext|>" + _LLAMA_TEMPLATE,
    ),
    "Dream": _llama_like("<|mask|>", "<|im_end|>", _QWEN_TEMPLATE, qkv_bias=True, shift=True),
    "a2d-qwen2": _llama_like("<|mask|>", "<|im_end|>", _QWEN_TEMPLATE, qkv_bias=True),
    "a2d-qwen3": _llama_like("<|mask|>", "<|im_end|>", _QWEN_TEMPLATE, qk_norm=True),
    "a2d-llama": _llama_like("<|mask|>", "<|eot_id|>", "<|begin_of_text|>" + _LLAMA_TEMPLATE),
    "illada": _llama_like("<[MASK]>"),
    # open-dcoder; an ordinary Qwen2 has no mask token.
    "qwen2": _llama_like("<M>", "<|im_end|>", _QWEN_TEMPLATE, qkv_bias=True, shift=True),
}  # fmt: skip
# These were trained with complete earlier blocks, but TIE reads answers behind masked reasoning.
BLOCK_CAUSAL = ("sdar", "trado", "llada2", "fast_dllm", "bd3lm")


# --- folders --------------------------------------------------------------------------------------

AnyPath = str | os.PathLike
Json = dict[str, Any]


def save(model: MDLM, path: AnyPath) -> None:
    """Write `model.safetensors` and then `config.json` to folder `path`, each atomically."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # Not save_file, which makes files that only their owner can read.
    weights = to_bytes(
        {name: weight.clone() for name, weight in model.state_dict().items()}, {"format": "pt"}
    )
    config = json.dumps({"model_type": "mdlm", **asdict(model.config)}, indent=1)
    for name, data in (("model.safetensors", weights), ("config.json", config.encode())):
        (folder / f"{name}.part").write_bytes(data)
        os.replace(folder / f"{name}.part", folder / name)


def load(
    path: AnyPath, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[MDLM, ModelConfig]:
    """Model in eval mode and config from a folder of one of the `FAMILIES`.

    With dtype None a toy keeps its stored dtype; a real checkpoint becomes float32 on a CPU and
    bfloat16 on a GPU. Names and shapes are checked before any weight is read. Raises ValueError, in
    one line that names the file, if the folder is incomplete or corrupt or not a model that MDLM
    supports, and if the device isn't available.
    """
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA raises AssertionError
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None
    folder = Path(path)
    family, config, tied = _read_config(folder)
    if dtype is None and family is not FAMILIES["mdlm"]:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = MDLM(config)
    names = {}  # in the files -> in our model
    for name in model.state_dict():
        names[".".join(family.names.get(part, part) for part in name.split("."))] = name
    shapes = {stored: list(model.get_parameter(name).shape) for stored, name in names.items()}
    state = {}
    for stored, file in _open_weights(folder, shapes, tied).items():
        # A copy: the file's own memory changes if the file does.
        state[names[stored]] = file.get_tensor(stored).to(device, dtype, copy=True)
    state.setdefault("head.weight", state["embed.weight"])
    model.load_state_dict(state, assign=True)
    return model.eval(), config


def _read_json(file: Path) -> Json:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: missing or corrupt ({error}): download it again") from None


def _read_config(folder: Path) -> tuple[Family, ModelConfig, bool]:
    """The family, the model's config, and whether the embedding is the head if none is stored."""
    file = folder / "config.json"
    raw = _read_json(file)
    kind = str(raw.get("model_type"))
    # A block-causal A2D model has the config of a bidirectional one; only its name differs.
    origin = str(folder.resolve()) if kind.startswith("a2d-") else kind
    for name in BLOCK_CAUSAL:
        if name in origin.lower():
            why = "is block-causal and cannot read an answer behind masked reasoning"
            raise ValueError(f"{file}: {name} {why}")
    if kind not in FAMILIES:
        raise ValueError(f"{file}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    for key, allowed in family.required.items():
        if raw.get(key) not in allowed:
            raise ValueError(f"{file}: {key} must be {allowed[-1]!r}, got {raw.get(key)!r}")
    values = {}
    for field in fields(ModelConfig):
        key = family.keys.get(field.name, field.name)
        needed = field.default is MISSING or field.name in family.keys
        if raw.get(key) is not None:
            values[field.name] = raw[key]
        elif needed and field.name not in ("mask_id", "pad_id"):
            raise ValueError(f"{file}: {key!r} is missing")
    values |= {"rope_theta": _rope_theta(file, raw), **family.overrides}
    if "mask_id" not in values:
        values["mask_id"] = _find_mask(folder, family)
    end = values["eos_id"]
    if isinstance(end, list):
        values["eos_id"] = tuple(end)
        end = end[0]
    values.setdefault("pad_id", end)
    try:
        config = ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    # transformers leaves the key out if it has the default value, which is True.
    return family, config, raw.get("tie_word_embeddings", True)


def _find_mask(folder: Path, family: Family) -> int:
    tokenizer, settings = _read_tokenizer(folder)
    mask = settings["mask_token"] or family.mask
    mask_id = tokenizer.token_to_id(mask)
    if mask_id is None:
        raise ValueError(
            f"{folder}: config.json has no mask_token_id and the tokenizer no {mask}: "
            "is this a causal language model?"
        )
    return mask_id


def _rope_theta(file: Path, raw: Json) -> float:
    """The base of the rotary positions, which transformers 5 writes to `rope_parameters`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{file}: rope_type must be 'default', got {kind!r}")
    bases = {base for base in (raw.get("rope_theta"), rope.get("rope_theta")) if base}
    if len(bases) != 1:
        raise ValueError(f"{file}: rope_theta must have one value, got {sorted(bases)}")
    return bases.pop()


def _open_weights(folder: Path, shapes: dict[str, list[int]], tied: bool) -> dict[str, Any]:
    """Checks names and shapes of all tensors against `shapes`. Returns the open file of each.
    If `tied`, the head may be missing."""
    index = folder / "model.safetensors.index.json"
    shards = dict.fromkeys(shapes, "model.safetensors")
    if index.exists():
        shards = _read_json(index).get("weight_map", {})
    files = {}
    for shard in sorted(set(shards.values())):
        path = folder / shard
        try:
            files[shard] = file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: missing or corrupt ({error}): download it again") from None
        for name in file.keys():  # noqa: SIM118, not a mapping
            if name not in shapes:
                raise ValueError(
                    f"{path}: unexpected tensor {name}: does config.json belong to it?"
                )
            shape = file.get_slice(name).get_shape()
            if shape != shapes[name]:
                raise ValueError(f"{path}: {name} must have shape {shapes[name]}, got {shape}")
    # A tensor may be stored in two files; the index says which one counts.
    found = {}
    for name in shapes:
        if name in shards and name in files[shards[name]].keys():  # noqa: SIM118
            found[name] = files[shards[name]]
        elif not (tied and name == "lm_head.weight"):
            raise ValueError(f"{folder}: tensor {name} is missing: download the folder again")
    return found


# --- tokenizers -----------------------------------------------------------------------------------

_OTHER = "does the tokenizer belong to another model?"
# A noncharacter, which no text contains. It breaks up special tokens in a question, so that only
# those of the template become ids.
_GUARD = "\ufdd0"
# Qwen's pattern, also Dream's: contractions, words, digits, punctuation, line ends, spaces.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextCodec:
    """Converts between text and ids for the folder of one model: a `tie.Codec`.

    `mask_id` is the mask token. `eos_id` holds all tokens that end an answer; the first of them,
    `pad_id`, is what fills up the rest. `vocabulary` holds the bytes of each id. Codecs with equal
    `key` convert alike, so members can share one of them and relay ids as they are. Prompts still
    need each folder's own codec, which has its chat template.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Json, family: Family, config: ModelConfig):
        ids = tokenizer.get_vocab()
        if config.mask_id not in (ids.get(settings["mask_token"]), ids.get(family.mask)):
            raise ValueError(f"{family.mask} must have the id {config.mask_id}: {_OTHER}")
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        # The padding that a model was trained with comes first.
        ends = [self._special.get(settings["pad_token"]), *config.eos_ids]
        ends += [ids.get(settings["eos_token"]), ids.get(family.end)]
        self.mask_id = config.mask_id
        self.eos_id = tuple(dict.fromkeys(i for i in ends if i not in (None, self.mask_id)))
        self.pad_id = self.eos_id[0]
        template = settings.get("chat_template") or family.template
        control = {token for token, i in ids.items() if i in (self.mask_id, *self.eos_id)}
        if template == family.template:
            control.update(re.findall(r"<\|\w+\|>", template))
        for token in sorted(control - ids.keys()):
            raise ValueError(f"{token} is missing: {_OTHER}")
        self._special |= {token: ids[token] for token in control}
        # Mark these existing tokens as special, so that plain text is never parsed as one.
        tokenizer.add_special_tokens(sorted(control))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        tokenizer.normalizer = None  # a relay must not change text; only prompts are normalised
        self._tokenizer = tokenizer
        for token in sorted(control):
            if ids[token] in self.encode(token):
                raise ValueError(f"id {ids[token]} must be special, got the text {token!r}")
        self.vocabulary = _token_bytes(tokenizer, config.vocab_size)
        self._template = _compile(template)
        self._bos = settings["bos_token"]
        self._eos = settings["eos_token"]

    @property
    def key(self) -> tuple:
        return (*self.vocabulary, *sorted(self._special.items()), self.mask_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Ids of exactly this text: nothing is added or normalised, and no id is special."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> bytes:
        """The bytes that `ids` stand for. Special tokens and unused ids stand for none."""
        return b"".join(self.vocabulary[i] for i in ids)

    def encode_prompt(self, question: str) -> list[int]:
        """The question in the chat template, up to where the answer begins."""
        for token in self._special:
            question = question.replace(token, token[0] + _GUARD + token[1:])
        text = self._template.render(
            messages=[{"role": "user", "content": question}],
            add_generation_prompt=True,
            enable_thinking=False,
            bos_token=self._bos,
            eos_token=self._eos,
        )
        ids = []
        for piece in re.split(f"({'|'.join(map(re.escape, self._special))})", text):
            if piece in self._special:
                ids.append(self._special[piece])
            else:
                ids += self.encode(self._normalize(piece.replace(_GUARD, "")))
        return ids


def load_codec(path: AnyPath) -> TextCodec:
    """Codec of a folder with tokenizer.json, or with vocab.json and merges.txt.

    Raises ValueError, in one line that names the folder or file, if the tokenizer is missing or
    corrupt, is not a byte-level BPE or doesn't belong to the folder's model, or if there is no chat
    template.
    """
    folder = Path(path)
    family, config, _ = _read_config(folder)
    tokenizer, settings = _read_tokenizer(folder)
    try:
        codec = TextCodec(tokenizer, settings, family, config)
        codec.encode_prompt("")  # now rather than later, if the template cannot be rendered
    except (ValueError, TemplateError) as error:
        raise ValueError(f"{folder}: tokenizer cannot be used: {error}") from None
    return codec


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, Json]:
    """The tokenizer with all its added tokens, and its settings."""
    file = folder / "tokenizer_config.json"
    settings = _read_json(file) if file.exists() else {}
    for key in ("bos_token", "eos_token", "pad_token", "mask_token"):
        token = settings.get(key) or ""
        settings[key] = token["content"] if isinstance(token, dict) else token
    file = folder / "chat_template.jinja"
    if file.exists():
        settings["chat_template"] = file.read_text(encoding="utf-8")
    added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    file = folder / "added_tokens.json"
    if file.exists():
        for content, i in _read_json(file).items():
            added.setdefault(i, {"content": content, "normalized": False})
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            tokenizer = Tokenizer(model)
            tokenizer.normalizer = NFC()
            byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = InSequence([Split(Regex(_PIECES), "isolated"), byte_level])
        for i in sorted(added):
            token = AddedToken(**added[i])
            tokenizer.add_tokens([token])
            if tokenizer.token_to_id(token.content) != i:
                raise ValueError(f"{token.content} must have the id {i}: {_OTHER}")
    except Exception as error:  # noqa: BLE001, tokenizers has no narrower class
        raise ValueError(
            f"{folder}: tokenizer cannot be used "
            f"(tokenizer.json, or vocab.json and merges.txt): {error}"
        ) from None
    return tokenizer, settings


def _compile(template: str) -> Template:
    """A chat template as transformers compiles it, but without the date, so that prompts don't
    change from day to day."""
    if not template:
        raise ValueError("there is no chat template")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def _token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes of each id (V): empty for special tokens, UTF-8 for other added tokens. The
    rest is decoded from GPT-2's byte alphabet."""
    # GPT-2 writes these bytes as themselves, and the others as the characters from U+0100 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    alphabet = {chr(b if b in printable else next(others)): b for b in range(256)}
    text = tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    if not text.keys() >= alphabet.keys():
        raise ValueError("it must be a byte-level BPE, but single bytes have no token")
    last = max(*text.values(), *added)
    if last >= vocab_size:
        raise ValueError(f"its ids must be below the model's {vocab_size}, got {last}")
    table = [b""] * vocab_size
    for token, i in text.items():
        table[i] = bytes(alphabet[c] for c in token)
    for i, entry in added.items():
        table[i] = b"" if entry.special else entry.content.encode()
    return table
