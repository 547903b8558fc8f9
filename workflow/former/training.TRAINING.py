# stands for 1d021c69235ea2328d6d322e9eeb34a0861499c2ba6d91dc2366eadfed7c03d5
TRAINING = {"augment", "objective_options", "optimizer", "lr", "classifier_lr", "proxy_lr", "momentum", "nesterov",
            "weight_decay", "schedule", "warmup", "batch_size", "sampler", "per_class", "clip", "validation",
            "dropout", "patience"}
