# stands for 1ff980c8911d549eba47e05395d86a642959be3e15fb4f844dc15500bfdbec78
from functools import partial
import io, warnings

import matplotlib.pyplot as plt
import numpy as np
import torch

from dml_companion import objectives, reproduction as R
from dml_companion.datasets import holdout_classes, load, subset_classes
from dml_companion.encoders import embed
from dml_companion.retrieval import evaluate, nearest, recall_at_k
from dml_companion.training import Collapsed, Recipe, Snapshots, TRAINING, fit, kept_epochs, step_bytes
start = R.now()
given = globals()
recipe = Recipe(**{name: given[name] for name in Recipe.model_fields})
row = row or recipe.objective or recipe.encoder
if evaluate_on not in ("test", "validation"): raise ValueError(f"evaluate_on must be 'test' or 'validation', got {evaluate_on!r}")
if evaluate_on == "validation" and not recipe.validation: raise ValueError("evaluate_on = 'validation' needs validation > 0")
print({k: v for k, v in recipe.model_dump().items() if k in recipe.changed})
benchmark = load(recipe.dataset, root=data or None, size=recipe.size, progress=False, **recipe.data_options)
identity = R.identify(recipe, row, seed, benchmark.digest, keeps={name: given[name] for name in R.KEEPS})
folder = R.project_root() / (folder or identity.folder)
for name in ("train", "query", "gallery"):
    if (split := getattr(benchmark, name)) is not None:
        print(f"{name:8s} {len(split):6d} images of {split.num_classes:5d} classes, for instance {', '.join(map(repr, split.class_names[:3]))}")
assert not set(benchmark.train.class_names) & set(benchmark.query.class_names)
train = holdout_classes(benchmark.train, recipe.validation, recipe.validation_seed)[0] if recipe.validation else benchmark.train
watch = {name: subset_classes(split, max(2, snapshots * split.num_classes // len(split)), seed=0)
         for name, split in (("seen", train), ("unseen", benchmark.query)) if snapshots and evaluate_on == "test"}
keep = Snapshots(folder, kept_epochs(recipe.epochs), **watch) if watch else None
make = partial(objectives.make, recipe.objective, **recipe.objective_options) if recipe.objective else None
query, gallery = benchmark.query, benchmark.gallery
if evaluate_on == "validation": query, gallery = holdout_classes(benchmark.train, recipe.validation, recipe.validation_seed)[1], None

def embedded(net): # the queries, and where the benchmark has a gallery, what they look for their likes in
    return embed(net, query), {} if gallery is None else {"gallery": embed(net, gallery), "gallery_labels": gallery.labels}

def observe(epoch, net, objective):
    if keep: keep(epoch, net, objective)
    if not watch_test or evaluate_on == "validation": return {}
    z, answers = embedded(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # classes of one image are named at the final evaluation
        return {f"test/{m}/recall@1": recall_at_k(z, query.labels, (1,), metric=m, **answers)[1] for m in ("cosine", "euclidean")}

common = dict(seed=seed, device=device, progress=False, weights=weights or None if recipe.pretrained else None)
notes = set()
try: run = fit(recipe, benchmark, make, folder=folder, observe=observe, **common)
except Collapsed as e:
    if evaluate_on == "test": raise
    notes.add(f"collapsed: {e}")                           # in a search that is a result, and worth no more than no training
    untrained = {k: v for k, v in recipe.model_dump().items() if k not in TRAINING} | {"epochs": 0, "objective": None}
    run = fit(Recipe(**untrained), benchmark, **common)
    print(*notes)
{k: v if not isinstance(v, float) else round(v, 2) for k, v in run.summary.items()}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    z, answers = embedded(run.encoder)
    if evaluate_on == "test": metrics = evaluate(z, query.labels, **answers, ks=(1, 2, 4, 8))
    else: metrics = {f"validation/{k}": v for k, v in evaluate(z, query.labels, ks=(1,), clustering=False).items()}
    if run.selected and evaluate_on == "test":
        run.encoder.load_state_dict(run.selected)
        chosen, rest = embedded(run.encoder)
        metrics |= {f"selected/{k}": v for k, v in evaluate(chosen, query.labels, **rest, ks=(1,), clustering=False).items()}
if looked := [e for e in run.history[1:] if "test/cosine/recall@1" in e]:
    best = max(looked, key=lambda e: e["test/cosine/recall@1"])                  # as the paper: by cosine, both read from that epoch
    metrics |= {f"best_on_test/{m}/recall@1": best[f"test/{m}/recall@1"] for m in ("cosine", "euclidean")} | {"best_on_test/epoch": best["epoch"]}
    assert looked[-1]["test/cosine/recall@1"] == metrics["cosine/recall@1"] or run.summary["device"] != "cpu"
notes = sorted(notes | {str(w.message) for w in caught if issubclass(w.category, UserWarning)})
{k: round(v, 4) for k, v in metrics.items()}
if evaluate_on == "test":
    np.savez(buffer := io.BytesIO(), embeddings=z.numpy(), labels=query.labels,
             **{k: np.asarray(v) for k, v in answers.items()})
    R.write_atomic(folder / "embeddings.npz", buffer.getvalue())
if keep:
    number = {name: i for i, name in enumerate(train.class_names)}               # a row of the classifier
    keep.merge(seen_labels=np.array([number[watch["seen"].class_names[k]] for k in watch["seen"].labels]),
               unseen_labels=watch["unseen"].labels)
if trained:
    seen = train.batch(slice(recipe.batch_size)), torch.as_tensor(train.labels[:recipe.batch_size])
    steps = sum(e["iterations"] for e in trained)
    costs = {"step_seconds": run.summary["seconds"] / steps, "step_megabytes": step_bytes(run.encoder, run.objective, recipe, *seen) / 1e6}
else: costs = {}
record = R.write_record(
    folder, run=identity.id, row=row, seed=seed, recipe=recipe.model_dump(mode="json"), code=identity.code,
    data={"name": benchmark.name, "digest": benchmark.digest, **{f"{n}_{what}": v for n in ("train", "query", "gallery") if (s := getattr(benchmark, n)) is not None
                                                               for what, v in (("images", len(s)), ("classes", s.num_classes))}},
    metrics=metrics, validation={k.split("/", 1)[1]: v for k, v in run.history[-1].items() if k.startswith("validation/")},
    history=run.history, timings={"train_seconds": run.summary["seconds"], "images_per_second": run.summary["images_per_second"], **costs},
    counts={k: float(sum(e.get(k, 0) for e in trained)) for k in ("anchors_without_positives", "anchors_without_negatives")},
    files=["embeddings.npz"] * (evaluate_on == "test") + ["epochs.npz"] * bool(keep) + ["checkpoint.pt"], notes=notes,
    provenance=R.provenance(start, run.summary["device"], R.TRAIN_NOTEBOOK))
print(record.label)
