# stands for 0c9db06db65668c24908e1a9f1741a73e688688550e68da72827a72325ae49b8
class Run:
    "The state of one training run; `fit` is its front door."
    def __init__(self, recipe: Recipe, data: Dataset, train: Split, watched: Split,
                 make_objective: Callable[..., Objective] | None, seed: int, folder: Path | None, device: str,
                 observe: Observer | None = None, weights: str | Path | None = None):
        "Build encoder, objective, optimiser and generators from the seed."
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        AcceleratorState._reset_state(reset_partial_state=True)   # one a process: forget the last run's precision, device
        self.accelerator = Accelerator(mixed_precision="bf16" if recipe.precision == "bf16" else "no", cpu=device == "cpu")
        if self.accelerator.num_processes > 1:
            raise ValueError("fit runs in one process: start it without `accelerate launch`")
        self.recipe, self.train, self.watched, self.folder, self.device = recipe, train, watched, folder, device
        self.validated, self.observe = bool(recipe.validation), observe
        self.identity = dict(recipe=recipe.model_dump(mode="json"), seed=seed, data=data.digest,
                             weights=file_sha256(weights) if weights else None)
        seed_everything(seed)
        channels, size = train.batch(np.arange(1)).shape[1:3]
        encoder = build_encoder(recipe.encoder, dim=recipe.dim, in_channels=channels, size=size,
                                norm=recipe.norm, dropout=recipe.dropout, freeze_bn=recipe.freeze_bn,
                                pretrained=recipe.pretrained, weights=weights, **recipe.encoder_options)
        self.generators = {k: torch.Generator().manual_seed(1000 * seed + i) for i, k in enumerate(("sampler", "augment"))}
        self.encoder, self.objective, self.optimizer = encoder.to(self.accelerator.device), None, None
        if make_objective:
            objective = make_objective(num_classes=train.num_classes, dim=encoder.dim)
            self.objective = objective.to(self.accelerator.device)
            optimizer = build_optimizer(parameter_groups(self.encoder, self.objective, recipe), recipe)
            self.encoder, self.objective, self.optimizer = self.accelerator.prepare(self.encoder, self.objective, optimizer)
        self.epoch = self.step = 0
        self.history, self.best, self.seconds = [], None, 0.

    def state(self) -> dict: # plain tensors and numbers
        "Everything that `restore` needs."
        return dict(identity=self.identity, epoch=self.epoch, step=self.step, history=self.history, best=self.best,
                    seconds=self.seconds,
                    encoder=self.encoder.state_dict(), objective=self.objective.state_dict() if self.objective else {},
                    optimizer=self.optimizer.state_dict() if self.optimizer else {}, random=random_states(self.generators))

    def restore(self, state: dict) -> None:
        "Continue where a checkpoint stopped."
        for name in ("epoch", "step", "history", "best", "seconds"): setattr(self, name, state[name])
        for name in ("encoder", "objective", "optimizer"):
            if getattr(self, name) is not None: getattr(self, name).load_state_dict(state[name])
        restore_random_states(state["random"], self.generators)

    def look(self, entry: dict) -> None:
        "Evaluate on the watched classes, keep the best validation epoch, and stop a run that fell below its start."
        entry |= {f"{'validation' if self.validated else 'train'}/{k}": v
                  for k, v in monitor(self.encoder, self.watched, self.device).items()}
        if self.observe: entry |= self.observed(entry)
        self.history.append(entry)
        recalls = [e[self.watch] for e in self.history]
        if self.validated and recalls[-1] >= max(recalls):
            weights = {k: v.detach().to("cpu", copy=True) for k, v in self.encoder.state_dict().items()}
            self.best = dict(epoch=self.epoch, encoder=weights, recall=recalls[-1])
        tail = recalls[1:][-self.recipe.patience:]
        if math.isnan(recalls[-1]) or (len(tail) == self.recipe.patience and max(tail) < recalls[0]):
            raise Collapsed(f"Recall@1 on {self.watch.split('/')[0]} classes is {recalls[-1]:.3f} after epoch "
                            f"{self.epoch}, the untrained encoder had {recalls[0]:.3f}, and {len(tail)} evaluations in a row "
                            f"stayed below it: the run learns the wrong thing (lr {self.recipe.lr:g}, objective "
                            f"{self.recipe.objective} {self.recipe.objective_options}). Lower lr, or check data and sampler")

    def observed(self, entry: dict) -> dict[str, float]:
        "What the run's observer returns, at no cost to the run's own randomness; it may not overwrite the loop's entries."
        before, unwrap = random_states(self.generators), self.accelerator.unwrap_model
        encoder, objective = unwrap(self.encoder), unwrap(self.objective) if self.objective else None
        modes = [(m, m.training) for m in (encoder, objective) if m is not None]
        try:
            for module, _ in modes: module.eval()
            seen = self.observe(self.epoch, encoder, objective) or {}
        finally:
            for module, mode in modes: module.train(mode)
            restore_random_states(before, self.generators)
        if taken := sorted(set(seen) & set(entry)):
            raise ValueError(f"observe returned {taken[0]!r}, which the training loop records itself: choose another name")
        return dict(seen)

    @property
    def watch(self) -> str: # key of the history
        "The number that is watched."
        return ("validation" if self.validated else "train") + "/recall@1"

    def save(self) -> None:
        "Write checkpoint and progress, if the run has a folder."
        if not self.folder: return
        save_atomic(self.state(), self.folder / "checkpoint.pt")
        line = dict(epoch=self.epoch, epochs=self.recipe.epochs, seconds=round(self.seconds, 1),
                    **{self.watch: self.history[-1][self.watch]})
        partial = self.folder / f"progress.json.{os.getpid()}.partial"
        partial.write_text(json.dumps(line), encoding="utf-8")
        os.replace(partial, self.folder / "progress.json")

    def go(self, progress: bool) -> Result:
        "Train from the first or the checkpointed epoch to the last."
        from tqdm import tqdm
        if self.folder: self.folder.mkdir(parents=True, exist_ok=True)
        state = load_checkpoint(self.folder / "checkpoint.pt", self.identity) if self.folder else None
        if state: self.restore(state)
        else: self.look(dict(epoch=0)); self.save()
        per_epoch = (len(epoch_batches(self.recipe, self.train.labels, torch.Generator().manual_seed(0)))
                     if self.recipe.epochs else 0)
        total = max(1, per_epoch * self.recipe.epochs)
        with tqdm(total=total, initial=min(self.step, total), disable=not progress, unit="batch",
                  desc=self.recipe.objective or "untrained", mininterval=2) as bar:
            while self.epoch < self.recipe.epochs:
                start = time.perf_counter()
                entry = train_epoch(self.accelerator, self.encoder, self.objective, self.optimizer, self.train, self.recipe,
                                    (self.step, total), self.generators, bar.update)
                spent = time.perf_counter() - start
                self.epoch += 1; self.step += entry["iterations"]; self.seconds += spent
                self.look(dict(epoch=self.epoch, seconds=spent, **entry)); self.save()
                bar.set_postfix_str(f"epoch {self.epoch} R@1 {self.history[-1][self.watch]:.3f}")
        return self.result()

    def result(self) -> Result:
        "Unwrap the modules and sum the run up."
        unwrap = self.accelerator.unwrap_model
        encoder = unwrap(self.encoder, keep_fp32_wrapper=False).cpu().eval()
        images = sum(e.get("iterations", 0) for e in self.history) * self.recipe.batch_size
        summary = dict(device=self.device, gpu=torch.cuda.get_device_name() if self.device == "cuda" else None,
                       epochs=self.epoch, seconds=self.seconds,
                       images_per_second=images / self.seconds if self.seconds else None,
                       best_epoch=self.best and self.best["epoch"],
                       parameters=sum(p.numel() for p in encoder.parameters()), train_images=len(self.train),
                       train_classes=self.train.num_classes,
                       watched=self.watch)
        objective = unwrap(self.objective).cpu() if self.objective else None
        return Result(encoder, objective, self.history, self.best and self.best["encoder"], summary)
