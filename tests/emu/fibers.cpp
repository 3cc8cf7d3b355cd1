// Stacks of the kernel's threads and the switch between them: assembly on x86-64 (14 ns), ucontext elsewhere (200 ns).
#include <sys/mman.h>

#include <cstdlib>

#include "emu/executor.h"

#if !defined(__x86_64__) || defined(EMU_PORTABLE_SWITCH)
#define EMU_USE_UCONTEXT
#include <ucontext.h>
#endif

EMU_HIDDEN uint3 emu_thread_index asm("emu_threadIdx");

namespace emu {

Fiber* current = nullptr;
Fiber launcher;
thread_local bool launch_is_here = false;
std::vector<Fiber> fibers;

void thread_main();  // scheduler.cpp

namespace {

char* new_stack() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE) != 0) std::abort();  // out of address space
  return static_cast<char*>(stack);
}

}  // namespace

#if !defined(EMU_USE_UCONTEXT)

extern "C" EMU_HIDDEN void emu_switch_stack(void** from, void* to);
asm(R"(.text
.globl emu_switch_stack
.hidden emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack,.-emu_switch_stack
)");

static void prepare(Fiber& fiber) {
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);  // 16-byte aligned before the "call"
  *--top = nullptr;                                                       // thread_main never returns
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.context.stack_pointer = top;
}
static void swap(Fiber& from, Fiber& to) { emu_switch_stack(&from.context.stack_pointer, to.context.stack_pointer); }

#else

static void prepare(Fiber& fiber) {
  if (fiber.context.stack_pointer == nullptr) fiber.context.stack_pointer = new ucontext_t;
  ucontext_t& context = *static_cast<ucontext_t*>(fiber.context.stack_pointer);
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, thread_main, 0);
}
static void swap(Fiber& from, Fiber& to) {
  if (from.context.stack_pointer == nullptr) from.context.stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context.stack_pointer), static_cast<ucontext_t*>(to.context.stack_pointer));
}

#endif

void switch_to(Fiber* to) {
  Fiber* from = current;
  if (to == from) return;
  if (to != &launcher && to->fresh) {
    if (to->stack == nullptr) to->stack = new_stack();
    prepare(*to);
    to->fresh = false;
  }
  current = to;
  emu_thread_index = to->thread;
  swap(*from, *to);
}

}  // namespace emu
