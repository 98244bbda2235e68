// What the unit of every instruction set is made of; included within its namespace.

#include "scales.inl"

#include "step.inl"

#include "encode.inl"

#include "decode.inl"

constexpr Kernels table_named(const char* name) {
    return {
        .name = name,
        .step_room = step::room_bytes,
        .step_ask = step::ask_item,
        .step_packed = step::packed_item,
        .step_finish = step::finish_item,
        .encode_room = encode::room_floats,
        .encode = encode::encode,
        .decode_room = decode::room_floats,
        .decode = decode::decode,
    };
}
