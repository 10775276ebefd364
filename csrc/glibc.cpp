#if defined(__linux__)
// libstdc++ asks this variable whether it may count references without atomics. Only glibc 2.32 and later have it, and
// the extension is to load with 2.28; this one, seen by the extension alone, says that there may be threads.
extern "C" {
char __libc_single_threaded = 0;
}
#endif
