// The entry point of libFuzzer: the first byte of an input chooses a file of operations, the second an operation of it.
#include "native.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input in(data, size);
  constexpr void (*kFiles[])(fuzz::Input&) = {fuzz::merge_operation, fuzz::model_operation, fuzz::attention_operation,
                                              fuzz::selection_operation};
  kFiles[in.below(std::size(kFiles))](in);
  return 0;
}
