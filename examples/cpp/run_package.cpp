// Runs a decoder's package without Python: a prompt, then tokens, greedily.
//
//   run_package decoder.pt2 model.safetensors 16 3 14 15 92      # 16 tokens after the prompt 3 14 15 92
//
// `model.safetensors` may be "-" where the package holds the weights. What the programs take stands in the
// package's record extra/clsa/layout.txt, a line a thing. The package must be one that you trust: it is native
// code, and its digest is checked by clsa_compile.load, not here.
#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;
using Tensors = std::unordered_map<std::string, at::Tensor>;

namespace {

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat},   {"F32", at::kFloat},    {"bfloat16", at::kBFloat16}, {"BF16", at::kBFloat16},
      {"float16", at::kHalf},    {"F16", at::kHalf},     {"int64", at::kLong},        {"I64", at::kLong},
      {"int32", at::kInt},       {"I32", at::kInt},      {"bool", at::kBool},         {"BOOL", at::kBool},
  };
  return known.at(name);
}

std::vector<int64_t> numbers(std::istringstream& line) {
  std::vector<int64_t> found;
  for (std::string word; line >> word && word != ";";) found.push_back(std::stoll(word));
  return found;
}

// A safetensors file: the length of a header, the header (JSON as safetensors writes it), the data.
Tensors read_safetensors(const std::string& path) {
  Tensors found;
  if (path == "-") return found;
  std::ifstream file(path, std::ios::binary);
  uint64_t length = 0;
  if (!file.read(reinterpret_cast<char*>(&length), sizeof length)) throw std::runtime_error("cannot read " + path);
  std::string header(length, ' ');
  file.read(header.data(), static_cast<std::streamsize>(length));
  static const std::regex entry(
      R"re("([^"]+)"\s*:\s*\{\s*"dtype"\s*:\s*"(\w+)"\s*,\s*"shape"\s*:\s*\[([\d,\s]*)\]\s*,\s*"data_offsets"\s*:\s*\[(\d+)\s*,\s*(\d+)\])re");
  for (std::sregex_iterator match(header.begin(), header.end(), entry), end; match != end; ++match) {
    std::string sizes = (*match)[3];
    for (char& c : sizes) c = c == ',' ? ' ' : c;
    std::istringstream words(sizes);
    at::Tensor made = at::empty(numbers(words), dtype_of((*match)[2]));
    file.seekg(static_cast<std::streamoff>(sizeof length + length + std::stoull((*match)[4])));
    file.read(static_cast<char*>(made.data_ptr()), static_cast<std::streamsize>(made.nbytes()));
    found.emplace((*match)[1], made);
  }
  return found;
}

struct Package {
  std::vector<std::string> caches;             // dtype and sizes of each, B and T among them
  std::map<std::string, Tensors> constants;    // by program
  std::map<std::string, at::Tensor> records;   // each tensor inside of the package once
  bool is_padded = false;
};

// Lines: "cache NAME DTYPE SIZE...", "padded", and
// "constant PROGRAM NAME DTYPE RECORD|- SIZE... ; STRIDE... ; NAME IN THE MODEL..."
Package read_package(const std::string& path, const Tensors& weights) {
  caffe2::serialize::PyTorchStreamReader reader(path);
  auto [data, size] = reader.getRecord("extra/clsa/layout.txt");
  std::istringstream layout(std::string(static_cast<const char*>(data.get()), size));
  Package found;
  for (std::string text; std::getline(layout, text);) {
    std::istringstream line(text);
    std::string kind, program, name, dtype, record;
    line >> kind;
    if (kind == "padded") found.is_padded = true;
    if (kind == "cache") found.caches.push_back(text.substr(text.find(' ', 6) + 1));
    if (kind != "constant") continue;
    line >> program >> name >> dtype >> record;
    const auto sizes = numbers(line), strides = numbers(line);
    at::Tensor value;
    if (record != "-") {
      at::Tensor& kept = found.records[record];
      if (!kept.defined()) {
        auto [bytes, count] = reader.getRecord("data/weights/" + record);
        kept = at::empty({static_cast<int64_t>(count)}, at::kByte);
        std::memcpy(kept.data_ptr(), bytes.get(), count);
      }
      value = kept.view(dtype_of(dtype)).as_strided(sizes, strides);
    }
    for (std::string known; record == "-" && !value.defined() && line >> known;)
      if (auto at = weights.find(known); at != weights.end()) value = at->second;
    if (!value.defined()) throw std::runtime_error("no weights for " + name);
    if (value.sizes() != at::IntArrayRef(sizes) || value.scalar_type() != dtype_of(dtype))
      throw std::runtime_error("the weights of " + name + " do not fit");
    if (value.strides() != at::IntArrayRef(strides))
      value = at::empty_strided(sizes, strides, value.options()).copy_(value);
    found.constants[program].emplace(name, value);
  }
  return found;
}

at::Tensor empty_cache(const std::string& text, int64_t batch, int64_t size) {
  std::istringstream line(text);
  std::string dtype, word;
  line >> dtype;
  std::vector<int64_t> sizes;
  while (line >> word) sizes.push_back(word == "B" ? batch : word == "T" ? size : std::stoll(word));
  return at::zeros(sizes, dtype_of(dtype));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 6) throw std::runtime_error("usage: run_package PACKAGE WEIGHTS|- STEPS TOKEN TOKEN...");
  const std::string path = argv[1];
  const int64_t steps = std::stoll(argv[3]);
  std::vector<int64_t> prompt;
  for (int i = 4; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));

  Package package = read_package(path, read_safetensors(argv[2]));
  AOTIModelPackageLoader prefill(path, "prefill"), decode(path, "decode");
  // Before the first run: code without weights crashes. The tensors stay ours, for both programs.
  prefill.load_constants(package.constants["prefill"], false, true, true);
  decode.load_constants(package.constants["decode"], false, true, true);

  const int64_t size = static_cast<int64_t>(prompt.size()) + steps;
  std::vector<at::Tensor> state;
  for (const std::string& cache : package.caches) state.push_back(empty_cache(cache, 1, size));
  state.push_back(at::zeros({}, at::kLong));  // the tokens that the caches hold; programs count them
  if (package.is_padded) state.push_back(at::zeros({1}, at::kLong));

  at::Tensor ids = at::tensor(prompt, at::kLong).view({1, -1});
  for (int64_t step = 0; step < steps; ++step) {
    std::vector<at::Tensor> inputs = {ids};
    inputs.insert(inputs.end(), state.begin(), state.end());
    at::Tensor logits = (step == 0 ? prefill : decode).run(inputs).at(0);
    ids = logits.argmax(-1, /*keepdim=*/true);
    std::cout << ids.item<int64_t>() << (step + 1 < steps ? " " : "\n") << std::flush;
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "run_package: " << error.what() << "\n";
  return 1;
}
