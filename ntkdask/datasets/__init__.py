"""Datasets in Zarr: `write_dataset` for arrays, `import_dataset` for files, `open_dataset` to read them by rows."""

from ntkdask.datasets.dataset import Dataset, open_dataset, open_parts
from ntkdask.datasets.from_arrays import write_dataset
from ntkdask.datasets.importing import import_dataset

__all__ = ["Dataset", "import_dataset", "open_dataset", "open_parts", "write_dataset"]
