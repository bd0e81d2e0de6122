"""Exact duplicates among documents, found by 128-bit hashes in memory that does not grow with their number."""

from __future__ import annotations

import numpy as np

from megaflow.data.prepare.shuffle import Buckets
from megaflow.data.prepare.spool import BoolArray, Spool

HASHED = np.dtype([("hash", "<u8", (2,)), ("document", "<i8")])


def duplicates(spool: Spool, partition_documents: int) -> BoolArray:
    """[D] True for each document of the spool that has the hash of an earlier one; a file mapped into memory.

    Hashes go to partitions of about `partition_documents` different ones, and each partition is sorted by itself. Two
    different texts of one hash are to be expected among 2^64 documents.
    """
    documents = spool.mark.documents
    number = -(-documents // partition_documents)
    sizes = np.zeros(number, np.int64)
    for rows in spool.rows():
        sizes += np.bincount((rows["hash"][:, 0] % number).astype(np.int64), minlength=number)
    found = np.memmap(spool.folder / "duplicates", np.bool_, "w+", shape=(documents,))
    with Buckets(spool.folder / "hashes", HASHED, sizes) as partitions:
        start = 0
        for rows in spool.rows():
            entries = np.empty(len(rows), HASHED)
            entries["hash"], entries["document"] = rows["hash"], np.arange(start, start + len(rows))
            start += len(rows)
            belongs = (rows["hash"][:, 0] % number).astype(np.int64)
            partitions.append(entries[np.argsort(belongs, kind="stable")], np.bincount(belongs, minlength=number))
        for partition in range(number):
            seen = np.empty(0, HASHED)
            # in parts, for one text may be there any number of times
            for entries in partitions.read(partition, partition_documents):
                entries = np.concatenate([seen, entries])
                entries = entries[np.lexsort((entries["hash"][:, 1], entries["hash"][:, 0]))]  # keeps input order
                again = np.zeros(len(entries), np.bool_)
                again[1:] = (entries["hash"][1:] == entries["hash"][:-1]).all(axis=1)
                found[entries["document"][again]] = True
                seen = entries[~again]
    return found
