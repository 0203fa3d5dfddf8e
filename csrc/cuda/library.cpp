// Registers the launches, and makes the module importable. In the emulator they take CPU tensors.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "operators.h"

using namespace fastdiff;

#ifdef FASTDIFF_EMULATED
constexpr bool kEmulated = true;
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
#else
constexpr bool kEmulated = false;
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
#endif
  m.impl("launch_row_loss", TORCH_BOX(&launch_row_loss));
  m.impl("launch_row_distill", TORCH_BOX(&launch_row_distill));
  m.impl("launch_scale", TORCH_BOX(&launch_scale));
  m.impl("launch_token_noise", TORCH_BOX(&launch_token_noise));
  m.impl("launch_subset", TORCH_BOX(&launch_subset));
  m.impl("launch_compact", TORCH_BOX(&launch_compact));
  m.impl("launch_row_sample", TORCH_BOX(&launch_row_sample));
  m.impl("launch_reverse_rows", TORCH_BOX(&launch_reverse_rows));
}

namespace {

#define FASTDIFF_QUOTED(...) #__VA_ARGS__
#define FASTDIFF_TEXT(...) FASTDIFF_QUOTED(__VA_ARGS__)

PyObject* build(PyObject*, PyObject*) { return PyUnicode_FromString(FASTDIFF_TEXT(FASTDIFF_ARCHITECTURES)); }

PyMethodDef methods[] = {
    {"build", build, METH_NOARGS, "The architectures that this extension was compiled for."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_cuda", "fastdiff's CUDA kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  PyObject* made = PyModule_Create(&module);
  if (made) PyModule_AddIntConstant(made, "emulated", kEmulated);
  return made;
}
