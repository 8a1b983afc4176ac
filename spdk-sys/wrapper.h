/* What bindgen reads. build.rs names every item that is taken from it. */
#include "shim.h"
