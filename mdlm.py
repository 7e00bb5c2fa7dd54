"""A masked diffusion language model (MDLM) in one file: toy model, LLaDA and Dream by configuration.

The model is a bidirectional transformer (RMSNorm, SwiGLU, rotary positions, optional grouped-query
attention and q/k/v biases) that predicts every masked token of a sequence at once. `MDLM` is a
`tie.Denoiser`: it gives logits at chosen positions only, and `logits[b, k]` is the distribution of
the token AT `positions[b, k]`. `Cached` is one too, which keeps keys and values from call to call. `load` reads a
folder of any of the three, `load_codec` its tokenizer.

Shapes: B sequences, L positions, N computed ones, K chosen ones, V vocabulary, D width, H heads, G key/value
heads, E head_dim.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InSequence
from torch import Tensor, nn

# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Shape and details of one model; the last three fields are what tells the LLaDA and Dream families apart.

    Raises ValueError, naming the field, for sizes that do not fit together and ids outside the vocabulary.
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
    rope_float32: bool = True  # rotate in float32 and cast back (LLaDA), or in the model's dtype (Dream)
    shift: bool = False  # the output at i-1 is the distribution of token i (Dream)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "hidden", "max_length"):
            most = 1000 if name == "layers" else 2**24  # beyond any model; the building of more would not end
            if type(value := getattr(self, name)) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} must be a positive whole number, at most {most}, not {value!r}")
        for name in ("norm_eps", "rope_theta"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        for name in ("qkv_bias", "rope_float32", "shift"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, not {value!r}")
        if self.width % (2 * self.heads):  # rotary positions turn pairs
            raise ValueError(f"width {self.width} must be a multiple of twice the {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        eos_ids = self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)
        if not eos_ids:
            raise ValueError("eos_id must be an id, or a list of at least one")
        for name, value in [("mask_id", self.mask_id), ("pad_id", self.pad_id), *(("eos_id", i) for i in eos_ids)]:
            if type(value) is not int or not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} {value!r} lies outside the vocabulary of {self.vocab_size}")
        if self.mask_id in (*eos_ids, self.pad_id):
            raise ValueError(f"mask_id {self.mask_id} is also eos_id or pad_id; the mask needs an id of its own")


class RMSNorm(nn.Module):
    """Normalised in float32, cast back to the model's dtype, then scaled, as both families do."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of rotary positions (B, L), cos and sin (B, L, E), the first half of sin negated, as `rotate` takes them;
    computed in float32, in `dtype`."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # (E/2,)
    angles = positions[:, :, None].float() * frequency  # (B, L, E/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, heads, L, E) by `rotary`'s cos and sin (B, L, E): component i with i + E/2, in their dtype; back in
    that of x."""
    y = x.to(cos.dtype)  # few operations follow: with small batches a GPU waits for the launch of each
    return (y * cos[:, None] + y.roll(y.shape[-1] // 2, -1) * sin[:, None]).to(x.dtype)


Memory = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values (B, G, N, E) of N computed positions -> those (B, G, L, E) of all positions to attend to."""


class Block(nn.Module):
    """Pre-norm attention over all positions (no causal mask), then a pre-norm SwiGLU."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, head_dim = c.heads, c.kv_heads, c.width // c.heads
        self.attn_norm = RMSNorm(c.width, c.norm_eps)
        self.q = nn.Linear(c.width, c.heads * head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.kv_heads * head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.kv_heads * head_dim, bias=c.qkv_bias)
        self.o = nn.Linear(c.heads * head_dim, c.width, bias=False)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps)
        self.gate = nn.Linear(c.width, c.hidden, bias=False)
        self.up = nn.Linear(c.width, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attn_mask: Tensor | None, chosen: Tensor | None,
        memory: Memory | None,
    ) -> Tensor:  # fmt: skip
        """x (B, N, D) -> (B, N, D), or (B, K, D) of those at the indices `chosen` (B, K) alone, which still see all.

        They attend to one another, or, with a `memory`, to all the keys and values that it makes of theirs.
        """
        y = self.attn_norm(x)
        k, v = (rearrange(z, "b n (g e) -> b g n e", g=self.kv_heads) for z in (self.k(y), self.v(y)))
        k = rotate(k, cos, sin)
        if memory is not None:
            k, v = memory(k, v)  # (B, G, L, E)
        if self.kv_heads < self.heads:
            k, v = (repeat(z, "b g l e -> b (g r) l e", r=self.heads // self.kv_heads) for z in (k, v))
        if chosen is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]  # (B, 1)
            x, y, cos, sin = (z.expand(len(x), -1, -1)[rows, chosen] for z in (x, y, cos, sin))  # (B, K, D or E)
        q = rotate(rearrange(self.q(y), "b k (h e) -> b h k e", h=self.heads), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)  # (B, H, K, E), scale 1 / sqrt(E)
        x = x + self.o(rearrange(y, "b h k e -> b k (h e)"))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class MDLM(nn.Module):
    """The denoiser p(x_0 | x_t) of a masked diffusion language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.width)
        # On the meta device, where `load` builds the model, normal_ would draw nothing and import for a second.
        self.embed = nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, K, V) of the tokens at `positions` (B, K), or (B, L, V) at all positions when None.

        tokens (B, L) int64; attention_mask (B, L) bool, False on padding: padding is never attended to, and
        logits at padding mean nothing. Raises ValueError for more positions than the config's max_length.
        """
        if positions is None and self.config.shift:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        chosen = None if positions is None else self.outputs_of(positions, attention_mask)
        return self.logits(tokens, *self.layout(tokens, attention_mask), chosen)

    def layout(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos and sin (B or 1, L, E) of the rows' positions, and the mask of their keys (B, 1, 1, L)."""
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise ValueError(f"{tokens.shape[1]} positions exceed the model's max_length of {c.max_length}")
        # A row is numbered as it would be alone. LLaDA's own code counts left padding too, which turns all of a row
        # alike: rotary attention reads differences only.
        numbers = torch.ones_like(tokens[:1]) if attention_mask is None else attention_mask.long()
        dtype = torch.float32 if c.rope_float32 else self.embed.weight.dtype
        cos, sin = rotary(numbers.cumsum(1) - 1, c.width // c.heads, c.rope_theta, dtype)
        # Dream's own code also hides real keys from padded queries; no real position can see the difference.
        return cos, sin, None if attention_mask is None else attention_mask[:, None, None, :]

    def outputs_of(self, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The positions (B, K) whose outputs speak of `positions`: the same ones, but under the shift those before;
        the first real position of a row keeps its own."""
        if not self.config.shift:
            return positions
        before = (positions - 1).clamp(min=0)  # (B, K)
        return before if attention_mask is None else torch.where(attention_mask.gather(1, before), before, positions)

    def logits(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, attn_mask: Tensor | None, chosen: Tensor | None,
        memories: Sequence[Memory | None] = (),
    ) -> Tensor:  # fmt: skip
        """Logits (B, K, V) from the outputs at the indices `chosen` (B, K) among tokens (B, N); see `Block.forward`."""
        x = self.embed(tokens)  # (B, N, D)
        for i, (block, memory) in enumerate(zip(self.layers, memories or [None] * len(self.layers)), start=1):
            # Nothing after the last layer reads other positions: a sixth of the toy's forward, a 36th of LLaDA's.
            x = block(x, cos, sin, attn_mask, chosen if i == len(self.layers) else None, memory)
        return self.head(self.norm(x))


class Cached:
    """An `MDLM` as a `tie.Denoiser` that keeps the keys and values of every layer from call to call. Approximate.

    A call computes anew the positions asked for and those whose token has changed since their keys and values were
    made, row by row (a commit, a relay); the others are attended to as they stand. Every `refresh`-th call computes
    everything anew, and so does the first of another batch or layout. The refresh goes by count alone: with the
    ensemble interval, refresh = n, it falls for all members on the first step of a round, whose changes no score
    counts. refresh = 1 is the exact model. Refreshed at each block's start, plain decoding by it is Fast-dLLM's dual
    cache (arXiv:2505.22618).

    The logit scores read every member's state through one cache, each as a change from the last; a row whose relays
    have ended then sees its refresh fall on other steps than it would alone. A batch is known by its fixed tokens, or
    by tokens as at its first call: where other starts of the same prompts follow in the same layout, or the weights
    change, take a new `Cached`. Raises ValueError where `model` is no MDLM, or `refresh` no whole number of at least 1.
    """

    def __init__(self, model: MDLM, refresh: int):
        if not isinstance(model, MDLM):
            raise ValueError(f"Cached needs an MDLM, whose layers it knows, not {type(model).__name__}")  # noqa: TRY004
        if type(refresh) is not int or refresh < 1:
            raise ValueError(f"refresh must be a whole number of at least 1, not {refresh!r}")
        self.model, self.refresh, self.calls = model, refresh, 0
        self.kept: list[tuple[Tensor, Tensor]] = []  # keys and values (B, G, L, E) of each layer
        self.tokens, self.real = torch.empty(0, 0), torch.empty(0, 0)  # (B, L) tokens and attention mask behind them
        self.first, self.fixed = self.tokens, self.real  # (B, L) the batch's first tokens; those that are no masks

    # No inference tensors: later calls, perhaps outside inference mode, write to what is kept.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, K, V) as `MDLM` gives them, from tokens (B, L), positions (B, K), attention_mask (B, L) bool."""
        cos, sin, attn_mask = self.model.layout(tokens, attention_mask)
        outputs = self.model.outputs_of(positions, attention_mask)  # (B, K)
        real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask  # (B, L)
        needed, count = self._needed(tokens, torch.cat([positions, outputs], dim=1), real)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]  # (B, 1)
        # (B, N) a row's needed positions; where it has fewer than N, its first again
        at = needed.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        at = torch.where(needed[rows, at], at, at[:, :1])
        cos, sin = (z.expand(len(tokens), -1, -1)[rows, at] for z in (cos, sin))  # (B, N, E)

        def memory(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            index = at[:, None, :, None].expand_as(k)  # (B, G, N, E)
            return keys.scatter_(2, index, k.to(keys.dtype)), values.scatter_(2, index, v.to(keys.dtype))

        chosen = needed.cumsum(1).gather(1, outputs) - 1  # (B, K), indices among the N
        memories = [functools.partial(memory, *kept) for kept in self.kept]
        logits = self.model.logits(tokens[rows, at], cos, sin, attn_mask, chosen, memories)
        self.tokens, self.real, self.calls = tokens.clone(), real.clone(), self.calls + 1
        return logits

    def _needed(self, tokens: Tensor, asked: Tensor, real: Tensor) -> tuple[Tensor, int]:
        """(B, L) bool, what to compute anew, and the most of a row. A new batch begins with nothing kept."""
        needed, new, count = torch.zeros_like(real).scatter(1, asked, True), True, 0
        if (tokens.shape, tokens.device) == (self.tokens.shape, self.tokens.device):
            changed = tokens != self.tokens
            needed |= changed
            renewed = (changed & self.fixed).any() | (tokens == self.first).all() | (real != self.real).any()
            # The one wait for the device in a step: its answer is the size of all that is computed.
            count, new = torch.stack([needed.sum(1).amax(), renewed.long()]).tolist()
        if new:
            c, weight = self.model.config, self.model.embed.weight
            sizes = len(tokens), c.kv_heads, tokens.shape[1], c.width // c.heads
            self.kept = []  # frees the last batch's memory before this one's is taken
            self.kept = [(weight.new_zeros(sizes), weight.new_zeros(sizes)) for _ in self.model.layers]
            self.calls, self.first, self.fixed = 0, tokens.clone(), tokens != c.mask_id
        whole = self.calls % self.refresh == 0
        return (torch.ones_like(real), tokens.shape[1]) if whole else (needed, count)


# --- the training loss --------------------------------------------------------------------------


def diffusion_loss(model: MDLM, tokens: Tensor, editable: Tensor, generator: torch.Generator) -> Tensor:
    """Negative ELBO of Eq. 4 with the linear schedule, nats a sequence, mean over the batch.

    tokens (B, L) int64; editable (B, L) bool: the positions that may be masked (prompt and suffix are not).
    At time t each editable token is masked with probability t; masked tokens cost cross-entropy / t. The
    times of a batch are spread evenly over (0, 1] from one random offset (low-discrepancy sampling).
    """
    B = tokens.shape[0]
    offset = torch.rand(1, generator=generator, device=tokens.device)
    t = 1 - (offset + torch.arange(B, device=tokens.device) / B) % 1  # (B,)
    t = t.clamp(min=1e-3)[:, None]  # (B, 1); lower, 1 / t would let single draws drown a batch; bias of order 1e-6
    masked = editable & (torch.rand(tokens.shape, generator=generator, device=tokens.device) < t)  # (B, L)
    logits = model(tokens.masked_fill(masked, model.config.mask_id))  # (B, L, V)
    cost = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none")  # (B, L)
    return (cost * masked / t).sum() / B


# --- families -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How one family's folder maps to MDLM and to its codec."""

    fields: dict[str, str]  # field of ModelConfig -> its key in config.json
    overrides: dict[str, bool]  # fields of ModelConfig that the family fixes
    required: dict[str, tuple]  # key of config.json -> the values with which MDLM is that model; None is absent
    names: dict[str, str]  # part of a tensor's name here -> there; parts not listed are the same
    eos_tokens: tuple[str, ...] = ()  # special tokens that end an answer
    template: str = ""  # chat template of one question


_OFF = (None, False)
FAMILIES = {
    "mdlm": Family(fields={f.name: f.name for f in fields(ModelConfig)}, overrides={}, required={}, names={}),
    "llada": Family(
        fields={"vocab_size": "vocab_size", "width": "d_model", "layers": "n_layers", "heads": "n_heads",
                "kv_heads": "n_kv_heads", "hidden": "mlp_hidden_size", "max_length": "max_sequence_length",
                "mask_id": "mask_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id",
                "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "rope_float32": "rope_full_precision"},
        overrides={},
        required={"block_type": ("llama",), "activation_type": ("silu",), "include_bias": (False,), "rope": (True,),
               "layer_norm_type": ("rms",), "layer_norm_with_affine": (True,), "bias_for_layer_norm": _OFF,
               "include_qkv_bias": (False,), "attention_layer_norm": _OFF, "multi_query_attention": _OFF,
               "input_emb_norm": _OFF, "weight_tying": (False,), "scale_logits": _OFF, "alibi": _OFF,
               "block_group_size": (None, 1), "clip_qkv": (None,), "rope_scaling": (None,)},
        names={"embed": "model.transformer.wte", "layers": "model.transformer.blocks", "attn_norm": "attn_norm",
               "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out", "mlp_norm": "ff_norm",
               "gate": "ff_proj", "up": "up_proj", "down": "ff_out", "norm": "model.transformer.ln_f",
               "head": "model.transformer.ff_out"},
        eos_tokens=("<|endoftext|>", "<|eot_id|>"),
        template="<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{trimmed}<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Dream": Family(
        fields={"vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
                "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "hidden": "intermediate_size",
                "max_length": "max_position_embeddings", "mask_id": "mask_token_id", "eos_id": "eos_token_id",
                "pad_id": "pad_token_id", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"},
        overrides={"qkv_bias": True, "rope_float32": False, "shift": True},
        required={"hidden_act": ("silu",), "rope_scaling": (None,), "use_mrope": _OFF, "use_sliding_window": _OFF,
               "tie_word_embeddings": _OFF},
        names={"embed": "model.embed_tokens", "layers": "model.layers", "attn_norm": "input_layernorm",
               "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
               "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
               "down": "mlp.down_proj", "norm": "model.norm", "head": "lm_head"},
        eos_tokens=("<|endoftext|>", "<|im_end|>"),
        template="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
                 "<|im_start|>assistant\n",
    ),
}  # fmt: skip


# --- folders ------------------------------------------------------------------------------------


def save(model: MDLM, path: str | os.PathLike) -> None:
    """Write `model.safetensors` and `config.json` into folder `path`, the config last, each atomically."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # Not save_file, whose files only their owner can read.
    weights = to_bytes({k: v.contiguous() for k, v in model.state_dict().items()}, metadata={"format": "pt"})
    config = json.dumps({"model_type": "mdlm", **asdict(model.config)}, indent=1).encode()
    for name, data in (("model.safetensors", weights), ("config.json", config)):
        (folder / f"{name}.part").write_bytes(data)
        os.replace(folder / f"{name}.part", folder / name)


def load(
    path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[MDLM, ModelConfig]:
    """Model in eval mode and config of a folder: toy (written by `save`), LLaDA or Dream by its config.json.

    dtype None keeps a toy's stored dtype; a real checkpoint, stored in bfloat16, becomes float32 on a CPU
    and bfloat16 on CUDA. Names and shapes of all files are checked before a weight is read; then each tensor
    goes straight to its device and dtype, one file at a time. Raises ValueError, one line naming the file, when
    the folder is incomplete or damaged, or holds what MDLM is not; and for a device that is not there.
    """
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    family, config = _read_config(Path(path))
    if dtype is None and family is not FAMILIES["mdlm"]:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = MDLM(config)
    ours = {".".join(family.names.get(part, part) for part in name.split(".")): name for name in model.state_dict()}
    state = {}
    for file in _open_weights(Path(path), {name: list(model.get_parameter(ours[name]).shape) for name in ours}):
        with file:
            for name in file.keys():  # noqa: SIM118, such a file is no mapping
                state[ours[name]] = file.get_tensor(name).to(device, dtype, copy=True)  # out of the mapped file
    model.load_state_dict(state, assign=True)
    return model.eval(), config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{file}: missing or damaged ({error}); fetch or write the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds no JSON object; fetch or write the file again")  # noqa: TRY004, bad input
    return value


def _read_config(folder: Path) -> tuple[Family, ModelConfig]:
    file = folder / "config.json"
    raw = _read_json(file)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ValueError(f"{file}: unknown model_type {raw.get('model_type')!r}; give one of {', '.join(FAMILIES)}")
    for key, allowed in family.required.items():
        if raw.get(key) not in allowed:
            raise ValueError(f"{file}: {key} {raw.get(key)!r} is not supported, only {allowed[-1]!r}")
    if missing := [key for key in family.fields.values() if raw.get(key) is None]:
        raise ValueError(f"{file}: {missing[0]!r} is missing; fetch or write the file again")
    values = {name: raw[key] for name, key in family.fields.items()} | family.overrides
    values["eos_id"] = tuple(values["eos_id"]) if isinstance(values["eos_id"], list) else values["eos_id"]
    try:
        return family, ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _open_weights(folder: Path, shapes: dict[str, list[int]]) -> list[Any]:
    """The folder's files, opened: every tensor of `shapes`, and no other, is in them with its shape (headers only)."""
    index, files, found = folder / "model.safetensors.index.json", [], set()
    shards = _read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise ValueError(f"{index}: 'weight_map' does not map tensors to files; fetch the file again")
    for path in sorted({folder / shard for shard in shards.values()}):
        try:
            files.append(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: missing or damaged ({error}); fetch or write the file again") from None
        for name in files[-1].keys():  # noqa: SIM118
            if name not in shapes:
                raise ValueError(f"{path}: unexpected tensor {name}; does config.json belong to these weights?")
            if (shape := files[-1].get_slice(name).get_shape()) != shapes[name]:
                raise ValueError(f"{path}: {name} has shape {shape}, but config.json asks for {shapes[name]}")
            if (kind := files[-1].get_slice(name).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{path}: {name} holds {kind}, not floating-point numbers; give unquantised weights")
            found.add(name)
    if missing := [name for name in shapes if name not in found]:
        raise ValueError(f"{folder}: tensor {missing[0]} is in none of its files; fetch the folder again")
    return files


# --- tokenizers ---------------------------------------------------------------------------------

_SPECIAL = r"<\|\w+\|>"  # a special token in a chat template
# Qwen's pattern, which Dream takes over: contractions, words, single digits, punctuation, line ends, spaces.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextCodec:
    """Text to ids and back for one LLaDA or Dream folder, a `tie.Codec`; made by `load_codec`.

    `eos_id` holds every id that ends an answer, by the names of the family's special tokens: a `tie.Member` takes
    its ids from here, since config.json knows only one of them. `vocabulary` holds the bytes of each id: members
    whose vocabulary, mask_id and eos_id are equal can share one codec and relay ids as they are.
    """

    def __init__(self, tokenizer: Tokenizer, family: Family, config: ModelConfig):
        control, vocabulary = {*family.eos_tokens, *re.findall(_SPECIAL, family.template)}, tokenizer.get_vocab()
        if missing := sorted(control - vocabulary.keys()):
            raise ValueError(f"it has no token {missing[0]}; is it of another model?")
        self._control = {token: vocabulary[token] for token in control}
        # These tokens exist; here they surely become special, and are never read from plain text.
        tokenizer.add_special_tokens(sorted(control))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        tokenizer.normalizer = None  # a relay must not change text; prompts are normalised as the family does
        self._tokenizer, self._template = tokenizer, family.template
        self.vocabulary = _token_bytes(tokenizer, config)
        self.mask_id, self.pad_id = config.mask_id, config.pad_id
        self.eos_id = tuple(vocabulary[token] for token in family.eos_tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of exactly this text: nothing added, nothing normalised, and no text becomes a special token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> bytes:
        """The bytes that `ids` stand for; special tokens and ids that the tokenizer does not use stand for none.

        Raises ValueError for an id outside the model's vocabulary.
        """
        if ids and not 0 <= min(ids) <= max(ids) < len(self.vocabulary):
            raise ValueError(f"ids {min(ids)} to {max(ids)} exceed the vocabulary of {len(self.vocabulary)}")
        return b"".join(self.vocabulary[i] for i in ids)

    def encode_prompt(self, question: str) -> list[int]:
        """The question in the family's chat template, up to where the answer begins."""
        ids: list[int] = []
        for piece in re.split(f"({_SPECIAL})", self._template):
            text = self._normalize(piece.format(question=question, trimmed=question.strip()))
            ids += [self._control[piece]] if piece in self._control else self.encode(text)
        return ids


def load_codec(path: str | os.PathLike) -> TextCodec:
    """Codec of a LLaDA or Dream folder: tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json.

    Raises ValueError, one line naming the folder or file, when these are missing or damaged, are no byte-level
    BPE, or do not belong to the folder's model.
    """
    folder = Path(path)
    family, config = _read_config(folder)
    whole = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(whole)) if whole.exists() else _dream_tokenizer(folder)
        return TextCodec(tokenizer, family, config)
    except Exception as error:  # noqa: BLE001, tokenizers raises no narrower class
        raise ValueError(f"{folder}: tokenizer cannot be used: {error}") from None


def _dream_tokenizer(folder: Path) -> Tokenizer:
    added = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    tokenizer = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = NFC()
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = InSequence([Split(Regex(_PIECES), "isolated"), byte_level])
    for i in sorted(added, key=int):
        tokenizer.add_tokens([AddedToken(**added[i])])
        if tokenizer.token_to_id(added[i]["content"]) != int(i):
            raise ValueError(f"{added[i]['content']} does not get its id {i}; is vocab.json of another model?")
    return tokenizer


def _token_bytes(tokenizer: Tokenizer, config: ModelConfig) -> list[bytes]:
    """The bytes of each id (V): GPT-2's byte alphabet undone, special tokens empty, other added tokens as UTF-8."""
    # GPT-2 writes these bytes as themselves, the others as the characters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    text, added = tokenizer.get_vocab(with_added_tokens=False), tokenizer.get_added_tokens_decoder()
    if not text.keys() >= alphabet.keys():
        raise ValueError("it is no byte-level BPE, since single bytes have no token")
    if (last := max(*text.values(), *added)) >= config.vocab_size:
        raise ValueError(f"its ids reach {last}, beyond the model's vocabulary of {config.vocab_size}")
    table = [b""] * config.vocab_size
    for token, i in text.items():
        table[i] = bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
    for i, entry in added.items():
        table[i] = b"" if entry.special else entry.content.encode()
    if table[config.mask_id] or table[config.pad_id]:
        raise ValueError(f"the model's mask id {config.mask_id} or pad id {config.pad_id} is text in it")
    return table
