"""Samples of tokenized rows: random, by the rows' content."""

from __future__ import annotations

import pyarrow as pa

from include.chat.tokenized import sample


def test_a_sample_depends_on_the_content_of_the_rows_and_not_on_their_places() -> None:
    ids = [[i, i % 7, 5] for i in range(1000)]

    def chosen(rows: list[list[int]], most: int) -> list[list[int]]:
        # `from_batches`: a column of several chunks, each with a place in larger buffers
        table = pa.table({"row": range(len(rows)), "input_ids": pa.array(rows, pa.list_(pa.int32())), "labels": rows})
        places = sample(pa.Table.from_batches(table.to_batches(max_chunksize=300)), most)
        assert sorted(set(places.tolist())) == places.tolist()
        return [rows[place] for place in places]

    found = chosen(ids, 100)
    assert len(found) == 100
    assert 30 < sum(row[0] < 500 for row in found) < 70, "not the first rows"
    assert sorted(chosen(ids[::-1], 100)) == found
    more = chosen([*([-i, 0, 0] for i in range(1, 51)), *ids], 100)
    assert len([row for row in more if row in found]) > 85, "new rows replace few of the others"
    assert chosen(ids, 1000) == chosen(ids, 2000) == ids
    pairs = pa.table({name: pa.array([[1], [2], [3]], pa.list_(pa.int32())) for name in ("prompt_ids", "chosen_ids")})
    assert len(sample(pairs, 2)) == 2
