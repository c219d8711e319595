# SPDX-License-Identifier: Apache-2.0
# The CTestTestfile.cmake of the install tree: `ctest -L gpu` in its folder runs the GPU tests on a machine without the
# source tree. Asks the binaries for their cases each time, as the build tree does; a tree without them has no cases.
# ctest sets no variable with the place of this file, but works in it.
execute_process(COMMAND pwd OUTPUT_VARIABLE here OUTPUT_STRIP_TRAILING_WHITESPACE)
foreach(program expertd_gpu_tests expertd_gpu_process_tests)
  set(binary "${here}/../../../bin/${program}")
  if(NOT EXISTS "${binary}")
    continue()
  endif()
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
      set_tests_properties("gpu.${name}" PROPERTIES LABELS gpu TIMEOUT 300 RUN_SERIAL TRUE
                                                    SKIP_REGULAR_EXPRESSION "\\[  SKIPPED \\]")
    endif()
  endforeach()
endforeach()
