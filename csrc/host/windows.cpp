// Windows of a corpus: document boundaries and what a batch needs of the tokens (twins in megaflow/data/packing.py).

#include "host.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr i32 kIgnore = -100;  // label of a position that carries no loss

}  // namespace

extern "C" {

// The mapped files of a corpus; megaflow/data/native.py has the same fields in the same order.
struct Stream {
    const void* tokens;
    const unsigned char* offsets;  // little-endian i64, not aligned: byte of the first token of each document
    const unsigned char* mask;     // one bit per token, lowest bit first, 0 = no loss; null where every bit would be 1
    i64 item_size;                 // bytes per token, 2 or 4
    i64 num_tokens;
    i64 num_documents;
    i64 vocab_size;
    i64 eos_id;
};

}  // extern "C"

namespace {

i64 offset_of(const Stream& stream, i64 document) {
    i64 offset;
    std::memcpy(&offset, stream.offsets + 8 * document, sizeof offset);
    return offset;
}

// The first document from `low` on, below `high`, that starts after byte `at`; the same probes as Python's bisect_right.
i64 first_after(const Stream& stream, i64 at, i64 low, i64 high) {
    while (low < high) {
        const i64 middle = (low + high) / 2;
        if (at < offset_of(stream, middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

bool bit_at(const unsigned char* mask, i64 at) { return (mask[at / 8] >> (at % 8)) & 1; }

// Takes the loss off the `count` labels whose bits begin at bit `at`; whole bytes go eight labels at a time.
void apply_mask(const unsigned char* mask, i64 at, i64 count, i32* labels) {
    const auto one = [&](i64 i) {
        if (!bit_at(mask, at + i)) labels[i] = kIgnore;
    };
    i64 i = 0;
    for (; i < count && (at + i) % 8 != 0; ++i) one(i);
    for (; i + 8 <= count; i += 8) {
        const i32 bits = mask[(at + i) / 8];
        for (i32 j = 0; j < 8; ++j) {
            const i32 keep = -((bits >> j) & 1);  // all ones or none
            labels[i + j] = (labels[i + j] & keep) | (kIgnore & ~keep);
        }
    }
    for (; i < count; ++i) one(i);
}

// The window [3, size] of tokens, labels and positions, rows `stride` apart; see megaflow_fill.
template <typename Id>
bool fill(const Stream& stream, i64 start, i64 stop, i64 size, i64 stride, const i64* starts, i64 found, i32* window) {
    const Id* ids = static_cast<const Id*>(stream.tokens) + start;
    const i64 length = stop - start, labelled = std::min(stop, stream.num_tokens - 1) - start;
    i32 *labels = window + stride, *positions = labels + stride;
    Id largest = 0;
    for (i64 i = 0; i <= labelled; ++i) largest = std::max(largest, ids[i]);  // a negative id is a large one
    if (static_cast<i64>(largest) >= stream.vocab_size) return false;
    for (i64 i = 0; i < length; ++i) window[i] = static_cast<i32>(ids[i]);
    for (i64 i = 0; i < labelled; ++i) labels[i] = static_cast<i32>(ids[i + 1]);
    std::fill(window + length, window + size, static_cast<i32>(stream.eos_id));
    std::fill(labels + labelled, labels + size, kIgnore);
    if (stream.mask != nullptr) apply_mask(stream.mask, start + 1, labelled, labels);
    i64 begin = 0;
    for (i64 d = 0; d <= found; ++d) {
        const i64 end = d < found ? starts[d] : size;
        for (i64 i = begin; i < end; ++i) positions[i] = static_cast<i32>(i - begin);
        if (d < found) labels[end - 1] = kIgnore;
        begin = end;
    }
    return true;
}

}  // namespace

extern "C" {

// Where documents start in tokens start + 1 .. stop, relative to start, ascending; the end of the stream is a start too.
// `starts` has room for stop - start + 1; `first` becomes the first of these documents. Returns how many there are, or
// -1 where the offsets do not increase.
i64 megaflow_starts(const Stream* stream, i64 start, i64 stop, i64* starts, i64* first) {
    const i64 size = stream->item_size, length = stop - start;
    *first = first_after(*stream, start * size, 0, stream->num_documents);
    const i64 last = first_after(*stream, stop * size, *first, std::min(*first + length, stream->num_documents));
    i64 found = 0;
    for (i64 document = *first; document < last; ++document)
        starts[found++] = (offset_of(*stream, document) >> (size >> 1)) - start;  // size is 2 or 4
    if (stop == stream->num_tokens) starts[found++] = length;
    for (i64 i = 0, before = 0; i < found; before = starts[i++])
        if (starts[i] <= before) return -1;
    return *first == 0 ? -1 : found;
}

// Fills `window` [3, size], rows `stride` apart, from tokens start .. stop - 1 in one pass: the tokens, padded with
// end-of-sequence; as labels the next tokens, -100 where masked, at document ends and on padding; positions that restart
// with every document and with the padding. `lengths` (room for size + 2) become those of its documents, padding last.
// Returns how many, or -1 where an id is outside the vocabulary or the offsets do not increase.
i64 megaflow_fill(const Stream* stream, i64 start, i64 stop, i64 size, i64 stride, i32* window, i64* lengths,
                  i64* first) {
    i64 found = megaflow_starts(stream, start, stop, lengths, first);
    if (found < 0) return -1;
    const i64 length = stop - start;
    if (length < size && (found == 0 || lengths[found - 1] != length)) lengths[found++] = length;
    const bool sound = stream->item_size == 2 ? fill<u16>(*stream, start, stop, size, stride, lengths, found, window)
                                              : fill<u32>(*stream, start, stop, size, stride, lengths, found, window);
    if (!sound) return -1;
    if (found == 0 || lengths[found - 1] != size) lengths[found++] = size;
    for (i64 d = found - 1; d > 0; --d) lengths[d] -= lengths[d - 1];
    return found;
}

// How many of tokens start + 1 .. stop, as far as there are any, are labels with loss: those that the mask does not
// take out and that begin no document. `starts`, `first` and `found` as for megaflow_starts, of which `found` is what it
// returns; -1 where it does.
i64 megaflow_count_labels(const Stream* stream, i64 start, i64 stop, i64* starts, i64* first, i64* found) {
    *found = megaflow_starts(stream, start, stop, starts, first);
    if (*found < 0) return -1;
    const i64 last = std::min(stop, stream->num_tokens - 1);
    const unsigned char* mask = stream->mask;
    i64 count = last - start;
    if (mask != nullptr) {
        count = 0;
        i64 at = start + 1;
        for (; at <= last && at % 8 != 0; ++at) count += bit_at(mask, at);
        for (; at + 8 <= last + 1; at += 8) count += __builtin_popcount(mask[at / 8]);
        for (; at <= last; ++at) count += bit_at(mask, at);
    }
    for (i64 d = 0; d < *found && start + starts[d] <= last; ++d)
        count -= mask == nullptr || bit_at(mask, start + starts[d]);
    return count;
}

}  // extern "C"
