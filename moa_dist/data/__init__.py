"""Text to shards, sample order, streaming.

No library does this: webdataset reads the shards but its order changes with the number of ranks,
and MosaicML's streaming neither packs text nor buckets pairs nor leaves damaged shards out.
"""
