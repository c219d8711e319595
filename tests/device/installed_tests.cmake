# SPDX-License-Identifier: Apache-2.0
# The CTestTestfile.cmake of the install tree: `ctest -L gpu` in its folder runs the GPU tests on a machine without the
# source tree. Asks the binary for its cases each time, as the build tree does.
set(binary "${CMAKE_CURRENT_LIST_DIR}/expertd_gpu_tests")
execute_process(COMMAND "${binary}" --gtest_list_tests OUTPUT_VARIABLE listed RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${binary} does not run here: ${result}")
endif()
string(REPLACE "\n" ";" lines "${listed}")
foreach(line IN LISTS lines)
  string(REGEX REPLACE " *#.*" "" line "${line}")
  if(line MATCHES "^[A-Za-z].*\\.$")
    set(suite "${line}")
  elseif(line MATCHES "^  ([A-Za-z].*)$")
    set(name "${suite}${CMAKE_MATCH_1}")
    add_test("gpu.${name}" "${binary}" "--gtest_filter=${name}")
    set_tests_properties("gpu.${name}" PROPERTIES LABELS gpu TIMEOUT 300 SKIP_REGULAR_EXPRESSION "\\[  SKIPPED \\]")
  endif()
endforeach()
