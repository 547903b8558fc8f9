# stands for 345f40860c6da16e7a062a5ed1ce026b33c8111d63b22090229e4ea7a8908d91
class DeviceRun(Run):
    "A run whose batches are made on the device; in several processes each embeds its part of every batch, and the loss sees all of it."
    backend: str | None = None # of torch.compile, as in `compiled`

    def __init__(self, *given: Any, **named: Any): # as Run
        "Upload the images, and compile what each step repeats."
        super().__init__(*given, **named)
        if self.objective is None: return
        device, parts = self.accelerator.device, self.accelerator.num_processes
        if self.recipe.batch_size % parts:
            raise ValueError(f"batch_size {self.recipe.batch_size} is no multiple of the {parts} processes that share it: change one of them")
        if self.backend is None: check_compiler(device)                                # before the images are sent
        if device.type == "cuda": torch.backends.cudnn.benchmark = True                # every batch has the same shape
        self.pack = DevicePack(self.train, device)
        self.augment, self.embed, self.loss = (compiled(f, device, self.backend) for f in (augment, self.encoder, self.objective.parts))

    def joint(self, encoder: Encoder) -> Encoder:
        "Batch norms that see the statistics of all parts; ValueError on CPUs, where torch cannot join them."
        live = [m for m in encoder.train().modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) and m.training]
        if self.accelerator.num_processes == 1 or not live: return encoder
        if self.accelerator.device.type != "cuda":
            raise ValueError("several processes on CPUs cannot join the statistics of their batch norms (SyncBatchNorm needs CUDA): "
                             "set freeze_bn=True and no batch norm layer, or train in one process")
        encoder.norm = nn.SyncBatchNorm.convert_sync_batchnorm(encoder.norm)
        if not encoder.freeze_bn: encoder.trunk = nn.SyncBatchNorm.convert_sync_batchnorm(encoder.trunk)
        return encoder

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]: # (b / processes, c, h, w) float and (b / processes,) labels, on the device
        "One epoch of this process's parts of the batches."
        share = self.accelerator.process_index, self.accelerator.num_processes
        dtype = torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32
        return training_batches(self.pack, self.recipe, self.generators, dtype=dtype, compiled=self.augment, share=share)

    def parts(self, images: Tensor, labels: Tensor) -> Parts:
        "Tightness and contrast of the whole batch, whoever embedded it, eq. (1)."
        embeddings = self.embed(images)
        if self.accelerator.num_processes > 1:
            embeddings, labels = Gather.apply(embeddings.float()), self.accelerator.gather(labels)
        return self.loss(embeddings, labels)

    def agree(self) -> None:
        "Proxies and classifiers have the same gradient in each process, but for rounding: remove that, too, so that they never part."
        if self.accelerator.num_processes == 1: return
        for p in self.objective.parameters():
            if p.grad is not None: dist.all_reduce(p.grad); p.grad /= self.accelerator.num_processes

    def look(self, entry: dict) -> None:
        "The first process looks, all hear what it saw: the history, or why to stop."
        if self.accelerator.num_processes == 1: return super().look(entry)
        told: list = [None, None]
        if self.accelerator.is_main_process:
            try: super().look(entry); told = [self.history[-1], None]
            except Exception as e: told = [None, e]                                      # raised below, in every process
        dist.broadcast_object_list(told)
        if told[1] is not None: raise told[1]
        if not self.accelerator.is_main_process: self.history.append(told[0])

    def save(self) -> None:
        "The first process writes, the others wait until it has."
        if self.accelerator.is_main_process: super().save()
        self.accelerator.wait_for_everyone()
