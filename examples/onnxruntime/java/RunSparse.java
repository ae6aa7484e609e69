// Runs a model with packed weights through com.microsoft.onnxruntime:onnxruntime 1.17 or later:
//
//     java -cp onnxruntime.jar RunSparse.java MODEL LIBRARY K [ROWS]
//
// MODEL has one input X, float32 [rows, K], and one output Y. LIBRARY is what
// `python -c "import zeroskip; print(zeroskip.custom_ops_path())"` prints.

import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import java.nio.FloatBuffer;
import java.util.Map;

public final class RunSparse {
  public static void main(String[] args) throws OrtException {
    if (args.length < 3) {
      System.err.println("usage: RunSparse MODEL LIBRARY K [ROWS]");
      System.exit(2);
    }
    int columns = Integer.parseInt(args[2]);
    int rows = args.length > 3 ? Integer.parseInt(args[3]) : 1;
    float[] x = new float[rows * columns];
    for (int i = 0; i < x.length; i++) {
      x[i] = i % 7 - 3;
    }

    OrtEnvironment environment = OrtEnvironment.getEnvironment();
    try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
      options.setIntraOpNumThreads(2);
      // The one line that makes packed weights fast.
      options.registerCustomOpLibrary(args[1]);
      try (OrtSession session = environment.createSession(args[0], options);
          OnnxTensor input =
              OnnxTensor.createTensor(
                  environment, FloatBuffer.wrap(x), new long[] {rows, columns});
          OrtSession.Result result = session.run(Map.of("X", input))) {
        OnnxTensor output = (OnnxTensor) result.get(0);
        FloatBuffer y = output.getFloatBuffer();
        while (y.hasRemaining()) {
          System.out.println(y.get());
        }
      }
    }
  }
}
