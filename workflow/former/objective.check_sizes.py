# stands for 5bd29023911fb6b6c5dd114eb559a52714f54057399f1684e6320833c0a50302
def check_sizes(name: str, # of the objective, for the message
                num_classes: int | None, dim: int | None) -> None: # both must be given
    "ValueError if an objective that owns one vector a class was not told how many and how long."
    if not num_classes or not dim:
        raise ValueError(f"{name} owns one vector a class: give num_classes and dim, got {num_classes} and {dim}")
