/* SPDX-License-Identifier: Apache-2.0 */
/* The C11 half of the layout test: offsets, sizes and the window as this compiler computes them. */
#include "tests/abi/layout_facts.h"

static const struct expertd_test_field kFields[] = {EXPERTD_TEST_STRUCTS(EXPERTD_TEST_STRUCT_ROW)
                                                        EXPERTD_TEST_FIELDS(EXPERTD_TEST_FIELD_ROW){0, 0, 0, 0}};

const struct expertd_test_field* expertd_test_c_fields(void) {
  return kFields;
}

struct expertd_ll_window_layout expertd_test_c_window(struct expertd_ll_window_shape shape, uint32_t payloads,
                                                      uint32_t set) {
  return expertd_ll_window_place_payloads(&shape, payloads, set);
}
