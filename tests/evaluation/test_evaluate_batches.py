from tensorpeft.evaluation.batches import batches_by_length, map_batches

LENGTHS = [3, 90, 1, 40, 2, 88, 41, 5]


def padded_size(batches):
    return sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)


def test_every_row_is_in_one_batch_the_longest_first():
    batches = list(batches_by_length(LENGTHS, 3))
    assert batches == [[1, 5, 6], [3, 7, 0], [4, 2]]


def test_less_is_padded_than_in_the_rows_order():
    in_order = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert padded_size(batches_by_length(LENGTHS, 2)) == 2 * (90 + 41 + 5 + 2) < padded_size(in_order) == 2 * 259


def test_equal_lengths_stay_in_their_order():
    assert list(batches_by_length([1, 1, 1], 2)) == [[0, 1], [2]]


def test_results_are_in_the_rows_order():
    seen = []
    rows = [f"row {length}" for length in LENGTHS]
    assert map_batches(lambda batch: [row.upper() for row in batch], rows, LENGTHS, 3, seen.append) == [
        row.upper() for row in rows
    ]
    assert seen == [[1, 5, 6], [3, 7, 0], [4, 2]]
