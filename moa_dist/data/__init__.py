"""Prepares text as shards, orders their samples, and streams them to ranks.

No library does this: webdataset reads the shards but its order changes with the number of ranks,
and MosaicML's streaming neither packs text nor buckets pairs nor excludes damaged shards.
"""
