# stands for 5ce21c19ac9bcad14d5ae4afb64523d88b0cdbce14a4ba6b143b3ccf8eff5733
def view(pack: Pack, rows: np.ndarray, # row numbers
        ) -> Split:
    "Rows of a pack as a split, labels re-numbered 0..K-1 in the order of the pack's classes."
    old, labels = np.unique(pack.labels[rows], return_inverse=True)
    return Split(Rows(pack.images, rows), labels, [pack.class_names[c] for c in old])
