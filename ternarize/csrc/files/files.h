// files/: stored tensors on their way from a file into memory. Each byte is read once, a piece at a
// time: hashed, checked and brought into the run-time layout while it is near. Of what is coded
// (formats/rans.md) a chunk at a time is decoded first.
#pragma once

#include "pack/lanes.h"

namespace ternarize {

// The dtype of stored scales; E: 8 bits, the upper half of a float16.
enum class ScaleKind { F16, BF16, F32, E };
inline int64_t size_of(ScaleKind kind) {  // bytes
  return kind == ScaleKind::F32 ? 4 : kind == ScaleKind::E ? 1 : 2;
}

// A tensor in a file.
struct Stored {
  enum class Form { Raw, Trits, Lanes };
  Form form;
  int64_t file;    // which of the files
  int64_t start;   // of the bytes in the file
  int64_t nbytes;
  bool coded;      // Trits and Lanes: the bytes are those of a stream
  uint8_t* out;    // where the bytes go, those of streams decoded, or null; Lanes: the run-time layout
  Lanes lanes;     // Trits and Lanes: `stored` is the matrix; of Trits the rest means nothing
  // Trits and Lanes: the scales, of each row and group, or one (`one_scale`); perhaps in another file.
  int64_t scale_file;
  int64_t scale_start;
  int64_t scale_bytes;
  bool scales_coded;
  ScaleKind scale_kind;
  bool one_scale;
  // Trits: where the bytes of the scales go, or null. Lanes: scales in the order block, group, row of the
  // block, with 0 beyond the last row; float16 of F16 and E, else float32.
  void* scale_out;

  int64_t scales() const { return one_scale ? 1 : lanes.stored.rows * lanes.stored.groups; }
};

// What has become of a tensor. Read by others while the threads are at work.
enum class Read : uint8_t {
  Waiting,
  Done,
  Unreadable,  // the file ends, or cannot be read
  NoCode,      // a byte is not a code, or has padding other than zero trits
  BadScale,    // one that is not finite or negative, or is 0 where its group is not, or the reverse
  Stopped,
  NoMemory,
  BadStream,  // one that breaks a rule of formats/rans.md
  Failed,     // by an exception other than that of missing memory
};

// Reads all n tensors in their order, each by one of the threads.
//
//   files    paths; each thread has at most two of them open
//   checked  hash them, and check scales; without it digests mean nothing. Codes are always checked.
//   states   n: each becomes what has become of its tensor, once its memory holds it
//   digests  n x 32: SHA-256 of a tensor's bytes followed by those of its scales
//   stop     when this is no longer 0, what has not begun is left out, and what has ends at its next piece
//
// False, and nothing done, where this CPU or system cannot; what `can_read_stored` tells.
bool can_read_stored();
bool read_stored(const char* const* files, const Stored*, int64_t n, bool checked, uint8_t* states,
                 uint8_t* digests, const uint8_t* stop, int threads);

}  // namespace ternarize
