# stands for 4f611670f7d9a98f9d330157d6dff1bef905c1e60b77fc0f0a117e5ceff7b391
def load_checkpoint(path: Path, # folder / checkpoint.pt
                    identity: dict, # what the run is: recipe, seed, data digest
                   ) -> dict | None: # None when there is none
    "Read a checkpoint of this very run; raises ValueError when it belongs to another run or cannot be read."
    if not path.exists(): return None
    try: state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e: raise ValueError(f"{path} cannot be read ({e}): delete it to train from the start") from e
    differ = [k for k, v in identity.items() if state["identity"].get(k) != v]
    if differ: raise ValueError(f"{path} belongs to another run (it differs in {', '.join(differ)}): "
                                "choose another folder, or delete the file to train from the start")
    return state
