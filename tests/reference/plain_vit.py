"""The paper in plain lines: a pre-norm ViT, the embedded forms, the unbound forms, the bypass.

Written from the equations, independent of the library (no import of it). All weights are plain
tensors in dictionaries, one per layer; read it first.
"""

import torch
import torch.nn.functional as F


def from_timm(state: dict, heads: int) -> dict:
    """Weights of a timm VisionTransformer."""
    layers = []
    for i in range(len({k.split(".")[1] for k in state if k.startswith("blocks.")})):
        p = f"blocks.{i}."
        qw, kw, vw = state[p + "attn.qkv.weight"].chunk(3)
        qb, kb, vb = state[p + "attn.qkv.bias"].chunk(3)
        layers.append(
            dict(
                n1=(state[p + "norm1.weight"], state[p + "norm1.bias"]),
                n2=(state[p + "norm2.weight"], state[p + "norm2.bias"]),
                q=(qw, qb),
                k=(kw, kb),
                v=(vw, vb),
                o=(state[p + "attn.proj.weight"], state[p + "attn.proj.bias"]),
                f1=(state[p + "mlp.fc1.weight"], state[p + "mlp.fc1.bias"]),
                f2=(state[p + "mlp.fc2.weight"], state[p + "mlp.fc2.bias"]),
            )
        )
    return dict(
        layers=layers,
        heads=heads,
        eps=1e-6,
        act=F.gelu,
        patch=(state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]),
        cls=state["cls_token"],
        pos=state["pos_embed"],
        norm=(state["norm.weight"], state["norm.bias"]),
        pre=None,
    )


def from_hf_vit(state: dict, heads: int) -> dict:
    """Weights of a transformers ViTModel."""
    return _from_hf(
        state,
        heads,
        "embeddings.patch_embeddings.projection",
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "layernorm",
        None,
        ("layernorm_before", "layernorm_after"),
        1e-12,
        F.gelu,
    )


def from_clip(state: dict, heads: int) -> dict:
    """Weights of a transformers CLIPVisionModel."""
    return _from_hf(
        state,
        heads,
        "patch_embedding",
        "class_embedding",
        "position_embedding.weight",
        "post_layernorm",
        "pre_layrnorm",
        ("layer_norm1", "layer_norm2"),
        1e-5,
        lambda x: x * torch.sigmoid(1.702 * x),
    )


def _from_hf(state, heads, patch, cls, pos, norm, pre, norms, eps, act):
    def pair(*ends):
        for end in ends:
            for key in state:
                if key.endswith(end + ".weight"):
                    stem = key.removesuffix(".weight")
                    return state[key], state.get(stem + ".bias")
        raise KeyError(ends)

    def one(end):
        return next(v for k, v in state.items() if k.endswith(end))

    marks = sorted(
        {k[: k.index(".", k.index("layers.") + 7)] for k in state if "layers." in k}
        or {".".join(k.split(".")[:3]) for k in state if ".layer." in k}
    )
    layers = []
    for mark in marks:
        own = {k: v for k, v in state.items() if k.startswith(mark + ".")}

        def sub(*ends, own=own):
            for end in ends:
                keys = [key for key in own if key.endswith(end + ".weight")]
                if keys:
                    # `output.dense` ends `attention.output.dense` too (older releases of transformers).
                    key = min(keys, key=len)
                    return own[key], own.get(key.removesuffix(".weight") + ".bias")
            raise KeyError(ends)

        layers.append(
            dict(
                n1=sub(norms[0]),
                n2=sub(norms[1]),
                q=sub("q_proj", "query"),
                k=sub("k_proj", "key"),
                v=sub("v_proj", "value"),
                o=sub("out_proj", "o_proj", "attention.output.dense"),
                f1=sub("fc1", "intermediate.dense"),
                f2=sub("fc2", "output.dense"),
            )
        )
    d = layers[0]["q"][0].shape[0]
    return dict(
        layers=layers,
        heads=heads,
        eps=eps,
        act=act,
        patch=pair(patch),
        cls=one(cls).reshape(1, 1, d),
        pos=one(pos).reshape(1, -1, d),
        norm=pair(norm),
        pre=pair(pre) if pre else None,
    )


def norm(x, wb, eps):
    return F.layer_norm(x, x.shape[-1:], wb[0], wb[1], eps)


def heads_of(x, h):
    return x.unflatten(-1, (h, -1)).transpose(-3, -2)


def merge(y):
    return y.transpose(-3, -2).flatten(-2)


def scores(q, k):
    return q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5


def attention(q, k, v):
    return scores(q, k).softmax(-1) @ v


def embed(w, images):
    x = F.conv2d(images, *w["patch"], stride=w["patch"][0].shape[-1]).flatten(2).mT
    x = torch.cat([w["cls"].expand(len(x), -1, -1), x], 1) + w["pos"]
    return norm(x, w["pre"], w["eps"]) if w["pre"] else x


def mha(w, layer, x, prefix=None, prompt=None):
    """Attention of the normed x; embedded prefix (K, V) or prompt tokens (VPT-deep)."""
    h, eps = w["heads"], w["eps"]
    y = norm(x, layer["n1"], eps)
    n = y.shape[1]
    if prompt is not None:
        tokens = norm(prompt, layer["n1"], eps).expand(len(y), -1, -1)
        y = torch.cat([y, tokens], 1)
    q, k, v = (heads_of(F.linear(y, *layer[m]), h) for m in "qkv")
    if prefix is not None:
        k_pre, v_pre = (heads_of(p, h).expand(len(x), -1, -1, -1) for p in prefix)
        k, v = torch.cat([k_pre, k], -2), torch.cat([v_pre, v], -2)
    return F.linear(merge(attention(q, k, v)), *layer["o"])[:, :n]


def mha_unbound(w, layer, x, keys, values):
    """(1 - lambda) Attn(Q, K, V) + lambda Attn(Q, K_t, V_t), per head and query."""
    y = norm(x, layer["n1"], w["eps"])
    q, k, v = (heads_of(F.linear(y, *layer[m]), w["heads"]) for m in "qkv")
    own, extra = scores(q, k).exp().sum(-1), scores(q, keys).exp().sum(-1)
    lam = (extra / (own + extra)).unsqueeze(-1)
    mixed = (1 - lam) * attention(q, k, v) + lam * attention(q, keys, values)
    return F.linear(merge(mixed), *layer["o"])


def ffn(w, layer, x):
    y = norm(x, layer["n2"], w["eps"])
    return F.linear(w["act"](F.linear(y, *layer["f1"])), *layer["f2"])


def bottleneck(a, x):
    return F.linear(F.gelu(F.linear(x, *a["down"])), *a["up"])


def forward(w, images, prefix=None, prompt=None, adapter=None, beside=None):
    """The class token after the final norm.

    prefix: (K, V) per layer; prompt: tokens per layer; adapter: sequential, after FFN, per layer;
    beside: Res-Tuning, per layer {"mha": (adapter, scale), "ffn": (adapter, scale)}.
    """
    x = embed(w, images)
    for i, layer in enumerate(w["layers"]):
        out = mha(w, layer, x, prefix[i] if prefix else None, prompt[i] if prompt else None)
        if beside:
            a, s = beside[i]["mha"]
            out = out + s * bottleneck(a, x)
        x = x + out
        out = ffn(w, layer, x)
        if adapter:
            out = out + bottleneck(adapter[i], out)
        if beside:
            a, s = beside[i]["ffn"]
            out = out + s * bottleneck(a, x)
        x = x + out
    return norm(x, w["norm"], w["eps"])[:, 0]


def streams(w, images):
    """x_0 ... x_L."""
    xs = [embed(w, images)]
    for layer in w["layers"]:
        x = xs[-1] + mha(w, layer, xs[-1])
        xs.append(x + ffn(w, layer, x))
    return xs


def bypass(w, images, horizontal, vertical, gates):
    """x_l' = lambda_l h_l(x_l) + (1 - lambda_l) v_l(x_{l-1}'); class token after the final norm."""
    xs = [x.detach() for x in streams(w, images)]
    state = xs[0]
    for x, h, v, g in zip(xs[1:], horizontal, vertical, gates, strict=True):
        lam = torch.sigmoid(g)
        state = lam * (x + bottleneck(h, x)) + (1 - lam) * (state + bottleneck(v, state))
    return norm(state, w["norm"], w["eps"])[:, 0]
