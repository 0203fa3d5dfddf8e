// Registers the CPU kernels with the operators that fastdiff/ops defines, and makes the module importable.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "isa.h"
#include "operators.h"

using namespace fastdiff;

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("row_loss.cpu", TORCH_BOX(&row_loss));
  m.impl("row_loss_.cpu", TORCH_BOX(&row_loss_));
  m.impl("row_distill.cpu", TORCH_BOX(&row_distill));
  m.impl("row_distill_.cpu", TORCH_BOX(&row_distill_));
  m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages));
  m.impl("mask_tokens.cpu", TORCH_BOX(&mask_tokens));
  m.impl("mask_exactly.cpu", TORCH_BOX(&mask_exactly));
  m.impl("harmonic_mask.cpu", TORCH_BOX(&harmonic_mask));
  m.impl("uniform_tokens.cpu", TORCH_BOX(&uniform_tokens));
  m.impl("row_sample.cpu", TORCH_BOX(&row_sample));
  m.impl("reverse_rows.cpu", TORCH_BOX(&reverse_rows));
  m.impl("fit_controls.cpu", TORCH_BOX(&fit_controls));
  m.impl("fit_controls_backward.cpu", TORCH_BOX(&fit_controls_backward));
}

namespace {

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(isa_name(current_isa()));
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* build(PyObject*, PyObject*) {
  return PyUnicode_FromFormat("%s, for torch >= %d.%d", kCompiler, int(TORCH_TARGET_VERSION >> 56 & 0xFF),
                              int(TORCH_TARGET_VERSION >> 48 & 0xFF));
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use: baseline, v3 or v4 (x86-64 levels)."},
    {"build", build, METH_NOARGS, "The compiler that built this extension, and the oldest torch it runs with."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_cpu", "fastdiff's CPU kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cpu() { return PyModule_Create(&module); }
