# stands for f830a9ba1e908f54de0e4ad5b4d2db265fa83bc6030b972a45bd89cfaf248d3b
def take_classes(split: Split,
                 classes: Sequence[int], # labels to keep
                ) -> Split:
    "The images of some classes, labels re-numbered from 0 in increasing order of the old ones; no image is copied."
    keep = np.flatnonzero(np.isin(split.labels, classes))
    old, labels = np.unique(split.labels[keep], return_inverse=True)
    rows = split.images if isinstance(split.images, Rows) else Rows(split.images, np.arange(len(split)))
    return Split(Rows(rows.store, rows.index[keep]), labels, [split.class_names[c] for c in old])
