"""Importers of formats that other libraries read: Zarr, HDF5 and NetCDF arrays, Parquet tables (`pip install 'ntkdask[formats]'`)."""
