"""A masked diffusion language model (MDLM) in one file: toy model, LLaDA and Dream by configuration.

The model is a bidirectional transformer (RMSNorm, SwiGLU, rotary positions, optional grouped-query
attention and q/k/v biases) that predicts every masked token of a sequence at once. `MDLM` is a
`tie.Denoiser`: it gives logits at chosen positions only, and `logits[b, k]` is the distribution of
the token AT `positions[b, k]`.

Shapes: B sequences, L positions, K chosen positions, V vocabulary, D width, H heads, G key/value heads, E head size.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Shape and habits of one model; the last three fields are what tells the LLaDA and Dream families apart."""

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
    count_padding: bool = False  # a left pad takes a position number (LLaDA), or does not (Dream, toy)
    shift: bool = False  # the output at i-1 is the distribution of token i (Dream)


class RMSNorm(nn.Module):
    """Normalised in float32, cast back to the model's dtype, then scaled, as both families do."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions: Tensor, head_size: int, theta: float) -> Tensor:
    """Angles (B, 1, L, E) of rotary positions (B, L), in float32; the two halves of E turn together."""
    exponent = torch.arange(0, head_size, 2, device=positions.device).float() / head_size  # (E/2,)
    angles = positions[:, None, :, None].float() / theta**exponent  # (B, 1, L, E/2)
    return torch.cat([angles, angles], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, H, L, E) by its positions, in the dtype of cos and sin (B, 1, L, E); back in the dtype of x."""
    y = x.to(cos.dtype)
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention over all positions (no causal mask), then a pre-norm SwiGLU."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        size = c.width // c.heads  # E
        self.heads, self.kv_heads = c.heads, c.kv_heads
        self.attn_norm = RMSNorm(c.width, c.norm_eps)
        self.q = nn.Linear(c.width, c.heads * size, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.kv_heads * size, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.kv_heads * size, bias=c.qkv_bias)
        self.o = nn.Linear(c.heads * size, c.width, bias=False)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps)
        self.gate = nn.Linear(c.width, c.hidden, bias=False)
        self.up = nn.Linear(c.width, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        y = self.attn_norm(x)
        q = rotate(rearrange(self.q(y), "b l (h e) -> b h l e", h=self.heads), cos, sin)
        k = rotate(rearrange(self.k(y), "b l (g e) -> b g l e", g=self.kv_heads), cos, sin)
        v = rearrange(self.v(y), "b l (g e) -> b g l e", g=self.kv_heads)
        k, v = (repeat(z, "b g l e -> b (g r) l e", r=self.heads // self.kv_heads) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # (B, H, L, E), scale 1 / sqrt(E)
        x = x + self.o(rearrange(y, "b h l e -> b l (h e)"))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class MDLM(nn.Module):
    """The denoiser p(x_0 | x_t) of a masked diffusion language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, K, V) of the tokens at `positions` (B, K), or (B, L, V) at all when None.

        tokens (B, L) int64; attention_mask (B, L) bool, False on padding: padding is never attended to.
        """
        c = self.config
        x = self.embed(tokens)  # (B, L, D)
        angles = rotary_angles(self._position_numbers(tokens, attention_mask), c.width // c.heads, c.rope_theta)
        dtype = torch.float32 if c.rope_float32 else x.dtype
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # (B or 1, 1, L, E)
        # Dream's own code also hides real keys from padded queries; no real position can see the difference.
        visible = None if attention_mask is None else attention_mask[:, None, None, :]  # (B, 1, 1, L)
        for block in self.layers:
            x = block(x, cos, sin, visible)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if c.shift:
            positions = (positions - 1).clamp(min=0)  # position 0 keeps its own output
        x = x.gather(1, positions[..., None].expand(-1, -1, c.width))  # (B, K, D)
        return self.head(self.norm(x))

    def _position_numbers(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None or self.config.count_padding:
            return torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, L)
        return (attention_mask.long().cumsum(-1) - 1).masked_fill(~attention_mask, 1)  # (B, L)


# --- the training loss --------------------------------------------------------------------------


def diffusion_loss(model: nn.Module, tokens: Tensor, editable: Tensor, generator: torch.Generator) -> Tensor:
    """Negative ELBO of Eq. 4 with the linear schedule, nats a sequence, mean over the batch.

    tokens (B, L) int64; editable (B, L) bool: the positions that may be masked (prompt and suffix are not).
    At time t each editable token is masked with probability t; masked tokens cost cross-entropy / t. The
    times of a batch are spread evenly over (0, 1] from one random offset (low-discrepancy sampling).
    """
    B = tokens.shape[0]
    offset = torch.rand(1, generator=generator, device=tokens.device)
    t = 1 - (offset + torch.arange(B, device=tokens.device) / B) % 1  # (B,)
    t = t.clamp(min=1e-3)[:, None]  # (B, 1); below, 1 / t would let single draws drown a batch
    masked = editable & (torch.rand(tokens.shape, generator=generator, device=tokens.device) < t)  # (B, L)
    logits = model(tokens.masked_fill(masked, model.config.mask_id))  # (B, L, V)
    cost = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none")  # (B, L)
    return (cost * masked / t).sum() / B


# --- folders: saving ----------------------------------------------------------------------------


def save(model: MDLM, path: str | os.PathLike) -> None:
    """Write `model.safetensors` and `config.json` into folder `path`, the config last, each atomically."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors.part")
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    config = {"model_type": "mdlm", **asdict(model.config)}
    (folder / "config.json.part").write_text(json.dumps(config, indent=1))
    os.replace(folder / "config.json.part", folder / "config.json")


# --- folders: loading ---------------------------------------------------------------------------


def load(
    path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[MDLM, ModelConfig]:
    """Model (in eval mode) and config of a folder written by `save`; dtype None keeps the stored one.

    Raises ValueError, one line naming the file, when the folder is incomplete or damaged.
    """
    file = Path(path) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); give a folder written by mdlm.save") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch or write the file again") from None
    if raw.pop("model_type", None) != "mdlm":
        raise ValueError(f"{file}: model_type is not 'mdlm'")
    raw["eos_id"] = tuple(raw["eos_id"]) if isinstance(raw["eos_id"], list) else raw["eos_id"]
    config = ModelConfig(**raw)
    with torch.device("meta"):
        model = MDLM(config)
    weights = Path(path) / "model.safetensors"
    try:
        with safe_open(weights, framework="pt", device=str(device)) as shard:
            state = {name: shard.get_tensor(name) for name in shard.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights}: cannot be read ({error}); fetch or write the file again") from None
    model.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    return model.eval(), config
